"""Worked solutions are right step by step, and depth sets how many steps there are."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vicugna import tasks
from vicugna.tasks import Difficulty, Item, split_seed

# For each family: what counts the parts of an item, and how many of them depth 1 has.
PARTS = {
    "chain_sum": (lambda item: len(re.findall(r"\d+", question(item))), 3),
    "number_sorting": (lambda item: len(item.answer.split()), 3),
    "number_filtering": (lambda item: len(question(item).split(": ")[1].split()), 3),
    "spell_backward": (lambda item: len(item.answer.split()), 3),
    "word_sequence_reversal": (lambda item: len(item.answer.split()), 3),
    "steps": (lambda item: question(item).count(">"), 1),
    "swaps": (lambda item: question(item).count("Swap"), 1),
}


def question(item: Item) -> str:
    return item.messages[0]["content"]


def make(family: str, index: int, depth: int, count: int = 1) -> Item:
    seed = split_seed("train", index)
    return tasks.get(f"reasoning.{family}").item(seed, Difficulty(depth=depth, count=count))


def test_every_family_is_listed_here() -> None:
    names = {name for name in tasks.TASKS if name.startswith("reasoning.")}
    assert names == {f"reasoning.{family}" for family in PARTS}


@pytest.mark.parametrize("family", PARTS)
@given(depth=st.integers(1, 8), index=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_depth_sets_the_number_of_parts(family: str, depth: int, index: int) -> None:
    parts, at_one = PARTS[family]
    assert parts(make(family, index, depth)) == at_one + depth - 1


@pytest.mark.parametrize("family", PARTS)
@given(index=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_messages_are_short_at_low_depth(family: str, index: int) -> None:
    item = make(family, index, 3)
    assert len(question(item)) <= 120
    assert len(item.solution.get("reasoning", "")) <= 200


@pytest.mark.parametrize("family", PARTS)
def test_depth_a_hundred(family: str) -> None:
    item = make(family, 0, 100)
    assert tasks.get(item.task).score(item, item.answer) == 1.0


@pytest.mark.parametrize("family", ["chain_sum", "steps"])
@given(depth=st.integers(1, 20), count=st.integers(0, 3), index=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_every_equation_holds_and_the_last_gives_the_answer(
    family: str, depth: int, count: int, index: int
) -> None:
    item = make(family, index, depth, count)
    equations = re.findall(r"(\d+)([-+*])(\d+)=(\d+)", item.solution["reasoning"])
    for a, sign, b, result in equations:
        computed = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert computed == int(result)
    assert equations[-1][3] == item.answer.split()[-1]
    if family == "steps":
        assert all(0 <= int(number) <= 19 for a, _, _, r in equations for number in (a, r))


def test_a_chain_sum_equals_its_expression() -> None:
    item = make("chain_sum", 4, 5, count=2)
    assert eval(question(item).removeprefix("Compute ").rstrip(".")) == int(item.answer)


@given(depth=st.integers(1, 30), count=st.integers(0, 5), index=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_swaps_follow_their_instructions(depth: int, count: int, index: int) -> None:
    item = make("swaps", index, depth, count)
    start, *swaps = question(item).rstrip(".").split(". ")
    cups = start.removeprefix("Cups: ").split()
    assert len(cups) == count + 3
    states = []
    for swap in swaps:
        i, j = (int(place) - 1 for place in swap.split()[1:])
        cups[i], cups[j] = cups[j], cups[i]
        states.append(" ".join(cups))
    assert item.solution["reasoning"] == "; ".join(states)
    assert item.answer == states[-1]


@given(depth=st.integers(1, 6), index=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_filtering_keeps_what_its_steps_say(depth: int, index: int) -> None:
    item = make("number_filtering", index, depth)
    verdicts = [step.split() for step in item.solution["reasoning"].split("; ")]
    kept = [number for number, verdict in verdicts if verdict == "yes"]
    assert item.answer == (" ".join(kept) or "none")


def test_nothing_is_not_the_answer_none() -> None:
    items = (make("number_filtering", index, 1) for index in range(10_000))
    item = next(item for item in items if item.answer == "none")
    task = tasks.get(item.task)
    assert task.score(item, "none") == 1.0
    assert task.score(item, "") == task.score(item, "0") == 0.0


@given(depth=st.integers(1, 6), index=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_sorting_takes_one_number_at_a_time(depth: int, index: int) -> None:
    item = make("number_sorting", index, depth)
    steps = item.solution["reasoning"].split("; ")
    numbers = sorted(question(item).split(": ")[1].split())
    for step in steps:
        taken, _, rest = step.partition(" | ")
        numbers.remove(taken)
        assert sorted(rest.split()) == numbers
    assert item.answer.split() == [step.split()[0] for step in steps]
