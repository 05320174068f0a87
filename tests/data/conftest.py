from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import pytest

from vicugna import tokenizer


@pytest.fixture(scope="session")
def tok() -> tokenizer.Tokenizer:
    return tokenizer.train([inspect.getsource(textwrap), "What is the code? " * 9], 500)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
