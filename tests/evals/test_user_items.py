"""A user's own questions."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from vicugna import tokenizer
from vicugna.errors import VicugnaError
from vicugna.evals import UserItems, plan_items
from vicugna.tasks import Difficulty

DAY = date(2026, 1, 1)
WORDS = tokenizer.train(["Who signed the contract with Ann Lee in Paris?"], 270)


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line)
                              for line in lines))
    return path


def test_items_are_planned_with_their_context(tmp_path: Path) -> None:
    (tmp_path / "contract.txt").write_text("Ann Lee signed it.")
    path = write(
        tmp_path, {"prompt": "Who?", "context_file": "contract.txt", "answers": ["Ann Lee"]}, "",
        {"messages": [{"role": "system", "content": "Be brief."},
                      {"role": "user", "content": "When?"}],
         "context_file": "contract.txt", "answers": ["1990", "in 1990"], "task": "dates"})
    plan, task = plan_items(path, WORDS, DAY, 32)
    assert [item.cluster for item in plan.items] == ["contract.txt"] * 2
    assert sorted(item.row for item in plan.items) == [("dates", "items", "default"),
                                                 ("items", "items", "default")]
    first = task.item(0, Difficulty())
    assert first.messages == [{"role": "user", "content": "Ann Lee signed it.\n\nWho?"}]
    assert task.item(1, Difficulty()).messages[1]["content"].endswith("When?")


def test_any_of_the_answers_counts(tmp_path: Path) -> None:
    task = UserItems(write(tmp_path, {"prompt": "?", "answers": ["four", "4"]}))
    assert [task.score(task.items[0], reply) for reply in ("4.0", "It is four.", "five")] == [
        1.0, 1.0, 0.0]


GOOD = {"prompt": "Who?", "answers": ["Ann"]}


@pytest.mark.parametrize("line", [
    "{", "[]", "3", '{"prompt": "\\ud800", "answers": ["a"]}', {"answers": ["a"]},
    {"prompt": "Who?"}, {"prompt": "Who?", "answers": []}, {"prompt": "Who?", "answers": "Ann"},
    {"prompt": "Who?", "answers": [""]}, {"prompt": "Who?", "answers": [3]},
    {"prompt": 3, "answers": ["a"]}, {"messages": [], "answers": ["a"]},
    {"messages": [{"role": "boss", "content": "x"}], "answers": ["a"]},
    {"messages": [{"role": "user"}], "answers": ["a"]},
    {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}],
     "answers": ["a"]}, {**GOOD, "messages": []},
    {"messages": [{"role": "assistant", "content": "x"}], "answers": ["a"]},
    {**GOOD, "context_file": "missing.txt"}, {**GOOD, "context_file": 3}, {**GOOD, "task": 4},
    "[" * 100_000])
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: Any) -> None:
    with pytest.raises(VicugnaError, match="line 3"):
        UserItems(write(tmp_path, GOOD, "", line))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(VicugnaError, match="no items"):
        UserItems(write(tmp_path, ""))
    with pytest.raises(VicugnaError, match="no such file"):
        UserItems(tmp_path / "none.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(VicugnaError, match="not UTF-8"):
        UserItems(tmp_path / "binary.jsonl")
    (tmp_path / "context").write_bytes(b"\xff\xfe")
    with pytest.raises(VicugnaError, match="line 1"):
        UserItems(write(tmp_path, {**GOOD, "context_file": "context"}))
