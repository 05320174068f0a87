"""reasoning-gym's datasets: refused, or pure and safe against the attack battery.

Needs the extra `reasoning-gym`; without it only the tests of what is said then run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from attacks import attacks

from vicugna import tasks
from vicugna.errors import VicugnaError
from vicugna.tasks import Difficulty, Item, split_seed
from vicugna.tasks.reasoning_gym import PREFIX, REFUSED

try:
    from reasoning_gym.factory import DATASETS
except ImportError:
    DATASETS = {}
OFFERED = sorted(set(DATASETS) - set(REFUSED))
# Several answers are right, so an attack can be one of them.
OTHER_FORMS = {"kakurasu", "quantum_lock", "palindrome_generation", "cryptarithm"}

installed = pytest.mark.skipif(not DATASETS, reason="the extra reasoning-gym is not installed")


def make(name: str, depth: int = 1, index: int = 0) -> Item:
    return tasks.get(PREFIX + name).item(split_seed("train", index), Difficulty(depth=depth))


def test_the_package_is_imported_only_when_used() -> None:
    code = "import sys, vicugna.tasks; print('reasoning_gym' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(VicugnaError) as error:
        tasks.get("reasoning_gym.leg_counting")
    assert "vicugna[reasoning-gym]" in error.value.fix and "C compiler" in error.value.fix


@pytest.mark.parametrize("name", REFUSED)
def test_unsafe_datasets_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(VicugnaError, match=REFUSED[name]):
        tasks.get(PREFIX + name)


@installed
def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(VicugnaError, match=r"'reasoning_gym\.leg_counting'"):
        tasks.get("reasoning_gym.leg_countin")


@installed
@pytest.mark.parametrize("name", OFFERED)
def test_items_are_pure_and_their_answers_right(name: str) -> None:
    item = make(name)
    assert item == make(name)
    assert isinstance(item.answer, str) and item.answer.strip()
    task = tasks.get(item.task)
    assert task.score(item, item.answer) == 1.0
    assert task.score(item, f"So it is:\n\n{item.answer}\n") == 1.0


@installed
@pytest.mark.parametrize("name", OFFERED)
def test_no_attack_scores(name: str) -> None:
    task = tasks.get(PREFIX + name)
    for index in range(2):
        item = make(name, 1, index)
        scored = [reply[:60] for reply in attacks(item)
                  if task.score(item, reply) and name not in OTHER_FORMS
                  and _last(reply, item) != item.answer.split()]
        assert scored == [], item.answer
    assert not Path("/tmp/vicugna-was-evaluated").exists()


def _last(reply: str, item: Item) -> list[str]:
    """The words of as many lines as the answer has."""
    lines = [line for line in reply.splitlines() if line.strip()]
    return " ".join(lines[-len(item.answer.split("\n")):]).split()


@installed
def test_depth_is_the_level_of_the_curriculum_up_to_its_last() -> None:
    answers = [make("spell_backward", depth).answer for depth in (1, 3, 100)]
    assert len(answers[0]) == 3 and max(map(len, answers)) <= 12
    with pytest.raises(VicugnaError, match="depth 100"):
        make("survo", 100)


@installed
def test_splits_share_no_question() -> None:
    task = tasks.get("reasoning_gym.leg_counting")
    questions = {split: {task.item(split_seed(split, i), Difficulty()).messages[0]["content"]
                         for i in range(50)} for split in tasks.SPLITS}
    merged = [question for split in questions.values() for question in split]
    assert len(merged) == len(set(merged))


@installed
def test_items_are_the_same_in_another_process() -> None:
    code = ("import sys; from vicugna import tasks\n"
            "for name in sys.argv[1:]:\n"
            "    item = tasks.get(name).item(tasks.split_seed('train', 0), tasks.Difficulty())\n"
            "    print(ascii(item))")
    names = [PREFIX + name for name in OFFERED if name != "acre"]  # it takes long to make
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *names],
                          capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONHASHSEED": "7"})
    assert done.stdout.splitlines() == [ascii(make(name.removeprefix(PREFIX))) for name in names]
