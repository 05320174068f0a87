from __future__ import annotations

import inspect
import json
import textwrap

import pytest

from vicugna import tokenizer


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return [inspect.getsource(textwrap), inspect.getsource(json),
            "The old teacher bought 12 pillows.\n\n  Then\tleft.\n" * 20]


@pytest.fixture(scope="session")
def tok(corpus: list[str]) -> tokenizer.Tokenizer:
    return tokenizer.train(corpus, 600)
