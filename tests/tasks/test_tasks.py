"""Every task follows the protocol: pure items, splits that share nothing, exact scores."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vicugna import tasks
from vicugna.errors import VicugnaError
from vicugna.tasks import SPLITS, TASKS, Difficulty, split_of, split_seed
from vicugna.tasks.task import final_line, rejection_sample, split_of_content

NAMES = sorted(TASKS)
difficulties = st.builds(
    Difficulty,
    length=st.integers(0, 2000),
    depth=st.integers(1, 6),
    count=st.integers(0, 4),
    position=st.none() | st.floats(0, 1),
)
seeds = st.builds(split_seed, st.sampled_from(list(SPLITS)), st.integers(0, 1 << 39))


@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds, difficulty=difficulties)
@settings(max_examples=25, deadline=None)
def test_items_are_pure_and_their_solutions_right(
    name: str, seed: int, difficulty: Difficulty
) -> None:
    task = tasks.get(name)
    item = task.item(seed, difficulty)
    assert item == task.item(seed, difficulty)
    assert (item.task, item.seed, item.difficulty) == (name, seed, difficulty)
    assert [message["role"] for message in item.messages] == ["user"]
    assert item.solution["role"] == "assistant" and item.solution["content"] == item.answer
    assert json.loads(json.dumps(item.metadata)) == item.metadata
    assert task.score(item, item.answer) == 1.0
    assert task.score(item, f"So it is:\n  {item.answer} \n\n") == 1.0


@pytest.mark.parametrize("name", NAMES)
@given(index=st.integers(0, 10**9), data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_corrupted_answer_scores_nothing(name: str, index: int, data: st.DataObject) -> None:
    task = tasks.get(name)
    item = task.item(split_seed("train", index), Difficulty(length=200, depth=2))
    place = data.draw(st.integers(0, len(item.answer) - 1))
    swapped = "7" if item.answer[place] != "7" else "3"
    wrong = item.answer[:place] + swapped + item.answer[place + 1 :]
    for response in (wrong, item.answer + "9", "9" + item.answer, "", "\n", item.answer * 40):
        assert task.score(item, response) == 0.0, response


@pytest.mark.parametrize("name", NAMES)
@given(response=st.text() | st.text("0123456789 .,'\"[]eEnN-+\n"))
@settings(max_examples=50, deadline=None)
def test_any_response_can_be_scored(name: str, response: str) -> None:
    task = tasks.get(name)
    item = task.item(split_seed("train", 1), Difficulty(depth=3))
    assert task.score(item, response) in (0.0, 1.0)


@pytest.mark.parametrize("depth", range(1, 9))
def test_a_long_word_with_letters_added_is_wrong(depth: int) -> None:
    task = tasks.get("reasoning.spell_backward")
    item = task.item(5, Difficulty(depth=depth))
    assert task.score(item, item.answer + " x") == 0.0


def test_a_sorted_list_that_is_off_by_one_is_wrong() -> None:
    task = tasks.get("reasoning.number_sorting")
    item = task.item(5, Difficulty(depth=2))
    first, rest = item.answer.split(" ", 1)
    assert task.score(item, f"{int(first) + 1} {rest}") == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_content(name: str) -> None:
    task = tasks.get(name)
    contents: dict[str, set[str]] = {}
    for split in SPLITS:
        items = [task.item(split_seed(split, i), Difficulty(depth=2)) for i in range(150)]
        key = "needle" if name in ("retrieval.single", "retrieval.keys") else ""
        contents[split] = {
            item.metadata[key] if key else item.messages[0]["content"] for item in items
        }
        assert len(contents[split]) > 75  # not a few items again and again
    merged = [content for split in contents.values() for content in split]
    assert len(merged) == len(set(merged))


@given(seed=seeds)
def test_every_seed_has_one_split(seed: int) -> None:
    found = [split for split, range_ in SPLITS.items() if seed in range_]
    assert found == [split_of(seed)]


def test_hash_space_is_shared_out_in_eighths() -> None:
    splits = [split_of_content("task", str(i)) for i in range(8000)]
    shares = {split: splits.count(split) / 1000 for split in SPLITS}
    wanted = {"train": 4, "dev": 1, "test": 2, "heldout": 1}
    assert all(abs(shares[split] - wanted[split]) < 0.3 for split in SPLITS)


def test_too_few_distinct_items_is_an_error() -> None:
    split = "dev" if split_of_content("few", "always") != "dev" else "test"
    with pytest.raises(VicugnaError, match=f"no {split} item"):
        rejection_sample("few", split_seed(split, 0), Difficulty(), lambda rng: "always", str)


def test_seeds_and_splits_outside_are_errors() -> None:
    for call in (
        lambda: split_seed("exam", 0),
        lambda: split_seed("test", -1),
        lambda: split_seed("test", 1 << 40),
        lambda: split_of(-1),
        lambda: split_of(1 << 60),
        lambda: tasks.get("reasoning.steps").item(-1, Difficulty()),
    ):
        with pytest.raises(VicugnaError):
            call()


@pytest.mark.parametrize(
    "bad", [{"length": -1}, {"depth": 0}, {"count": -1}, {"position": 1.5}], ids=str
)
def test_impossible_difficulties_are_errors(bad: dict[str, float]) -> None:
    with pytest.raises(VicugnaError, match=next(iter(bad))):
        Difficulty(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("retrieval.singel", "retrieval.single"), ("reasoning.step", "reasoning.steps")],
)
def test_an_unknown_name_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(VicugnaError, match=f"'{right}'"):
        tasks.get(wrong)


def test_items_are_the_same_in_threads_and_in_another_process() -> None:
    wanted = [TASKS[name].item(split_seed("test", 3), Difficulty(depth=3)) for name in NAMES]
    with ThreadPoolExecutor(8) as pool:
        again = list(
            pool.map(
                lambda name: TASKS[name].item(split_seed("test", 3), Difficulty(depth=3)),
                NAMES * 5,
            )
        )
    assert again == wanted * 5
    code = (
        "from vicugna.tasks import *\n"
        "for name in sorted(TASKS):\n"
        "    print(ascii(TASKS[name].item(split_seed('test', 3), Difficulty(depth=3))))"
    )
    lines = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert lines == [ascii(item) for item in wanted]


@pytest.mark.parametrize(("name", "digest"), [
    ("reasoning.chain_sum", "335f74be6727d56e"),
    ("reasoning.number_filtering", "b47a4253af7a4d9d"),
    ("reasoning.number_sorting", "f5cfaf81539352ad"),
    ("reasoning.spell_backward", "da5d5b4bb055dae9"),
    ("reasoning.steps", "0c619f91d658cd0e"),
    ("reasoning.swaps", "196b9598bf7dc1eb"),
    ("reasoning.word_sequence_reversal", "729c909f7ca5b2db"),
    ("retrieval.hashhop", "9434083ef6166016"),
    ("retrieval.keys", "b23fb766b7eb3d29"),
    ("retrieval.single", "6d26ef9754eae686"),
    ("retrieval.variables", "a6a8fa3fd88cda43"),
])
def test_items_are_the_same_on_every_python_and_in_every_version(name: str, digest: str) -> None:
    """Scores of different days and machines are of the same questions."""
    items = [TASKS[name].item(split_seed(split, i), Difficulty(length=300, depth=depth, count=2))
             for split in ("train", "test") for i in range(20) for depth in (1, 3, 7)]
    text = "\n".join(repr((item.messages, item.answer, item.solution)) for item in items)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_final_line() -> None:
    assert final_line("a\n  b   c \n \n") == "b c"
    assert final_line(" \n") == ""
