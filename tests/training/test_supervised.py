"""What supervised fine-tuning says of its data."""

from pathlib import Path

import pytest

from vicugna.data import Stream
from vicugna.data.procedural import TaskRows
from vicugna.data.sources import SourceSpec
from vicugna.tokenizer import MINIMUM_VOCABULARY, train
from vicugna.training.supervised import warn_of_plain_text


def test_plain_text_is_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = TaskRows(SourceSpec(source="task:reasoning.steps"), train(["x"], MINIMUM_VOCABULARY),
                    2000, 0, "train", 0)
    warn_of_plain_text(Stream([rows], [1.0], ""), "sft", tmp_path)
    assert not capsys.readouterr().err and not (tmp_path / "warnings.txt").exists()
    warn_of_plain_text(Stream([rows], [1.0], "", ["a.txt", "b/*.md"]), "sft", tmp_path)
    said = capsys.readouterr().err
    assert said == (tmp_path / "warnings.txt").read_text()
    first, second = said.splitlines()
    assert first.startswith("warning: sft: a.txt is plain text") and "b/*.md" in second
