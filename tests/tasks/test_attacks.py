"""No reply scores but the answer: each task of ours withstands the attack battery."""

from __future__ import annotations

from pathlib import Path

import pytest
from attacks import attacks

from vicugna import tasks
from vicugna.tasks import TASKS, Difficulty, split_seed


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("name", sorted(TASKS))
def test_no_attack_scores(name: str, depth: int) -> None:
    task = tasks.get(name)
    for index in range(6):
        item = task.item(split_seed("train", index), Difficulty(length=300, depth=depth, count=2))
        assert task.score(item, item.answer) == 1.0
        scored = [reply[:80] for reply in attacks(item) if task.score(item, reply) != 0.0
                  and _words(reply) != _words(item.answer)]
        assert scored == [], item.answer
    assert not Path("/tmp/vicugna-was-evaluated").exists()


@pytest.mark.parametrize("name", sorted(TASKS))
def test_all_candidates_listed_score_nothing(name: str) -> None:
    """The answers of other items, and every permutation that a question's words allow."""
    task = tasks.get(name)
    items = [task.item(split_seed("train", i), Difficulty(length=300, depth=2)) for i in range(30)]
    item, others = items[0], [other.answer for other in items[1:]]
    for separator in (" ", ", ", "; ", " or ", "\n"):
        listed = separator.join([item.answer, *(o for o in others if o != item.answer)])
        assert task.score(item, listed) == 0.0
    assert sum(task.score(item, other) for other in others if other != item.answer) == 0.0


def _words(reply: str) -> str:
    """What the tasks' rule leaves of a reply: its last line without white space and full stop."""
    lines = [line for line in reply.splitlines() if line.strip()]
    return "".join(lines[-1].split()).rstrip(".") if lines else ""
