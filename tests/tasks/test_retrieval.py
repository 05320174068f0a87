"""Needles stand where they should, in texts as long as asked, and filler never looks like one."""

from __future__ import annotations

import re
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vicugna import tasks
from vicugna.errors import VicugnaError
from vicugna.tasks import Difficulty, Item, split_seed
from vicugna.tasks.words import filler, made_up_names

NAMES = [name for name in tasks.TASKS if name.startswith("retrieval.")]
CODE = re.compile(r"The code of (\w+ \w+) is (\d{4})\.")
LET = re.compile(r"Let (\w+) be (\w+)\.")
PAIR = re.compile(r"(\w+) = (\w+)\.")


def make(name: str, index: int = 0, **difficulty: float | None) -> Item:
    return tasks.get(name).item(split_seed("test", index), Difficulty(**difficulty))  # type: ignore[arg-type]


def context(item: Item) -> str:
    return item.messages[0]["content"].rsplit("\n", 1)[0]


def follow(links: dict[str, str], start: str) -> list[str]:
    path = [start]
    while path[-1] in links:
        path.append(links[path[-1]])
    return path


@pytest.mark.parametrize("name", NAMES)
@given(length=st.integers(500, 20_000), index=st.integers(0, 10**6), depth=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_length_is_accurate_to_a_few_percent(
    name: str, length: int, index: int, depth: int
) -> None:
    text = make(name, index, length=length, depth=depth).messages[0]["content"]
    assert abs(len(text) - length) <= max(15, 0.03 * length)


@pytest.mark.parametrize("name", NAMES)
@given(position=st.floats(0, 1), index=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_position_is_honoured(name: str, position: float, index: int) -> None:
    item = make(name, index, length=6000, depth=2, count=3, position=position)
    text, needle = context(item), item.metadata["needle"]
    assert text.count(needle) == 1
    found = text.index(needle) / (len(text) - len(needle))
    assert abs(found - position) < 0.01
    assert abs(item.metadata["position"] - found) < 0.01


@given(seed=st.integers(), characters=st.integers(0, 5000))
@settings(deadline=None)
def test_filler_fills_and_never_looks_like_a_needle(seed: int, characters: int) -> None:
    text = " ".join(filler(Random(seed), characters))
    assert characters - 12 <= len(text) + 1 <= max(characters, 1)
    assert not re.search(r"\d|=|\bcode\b|\bLet\b|\bis\b", text)


def test_a_single_needle_has_no_distractors() -> None:
    item = make("retrieval.single", length=3000, count=5)
    key = item.messages[0]["content"].rsplit("code of ", 1)[1].rstrip("?")
    assert CODE.findall(context(item)) == [(key, item.answer)]


@pytest.mark.parametrize("count", [0, 1, 7, 300, 9999])
def test_distractor_keys_are_distinct_and_counted(count: int) -> None:
    item = make("retrieval.keys", length=2000, count=count)
    codes = CODE.findall(context(item))
    assert len(codes) == len(dict(codes)) == count + 1
    key = item.messages[0]["content"].rsplit("code of ", 1)[1].rstrip("?")
    assert dict(codes)[key] == item.answer
    if count > 1:
        shared = [
            other for other, _ in codes if other != key and set(other.split()) & set(key.split())
        ]
        assert shared


def test_more_keys_than_names_is_an_error() -> None:
    with pytest.raises(VicugnaError, match="count is 10000"):
        make("retrieval.keys", count=10_000)


@given(depth=st.integers(1, 20), count=st.integers(0, 6), index=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_variables_chain_to_the_value(depth: int, count: int, index: int) -> None:
    item = make("retrieval.variables", index, length=1000, depth=depth, count=count)
    statements = LET.findall(context(item))
    assert len(statements) == len(dict(statements)) == (count + 1) * (depth + 1)
    start = item.messages[0]["content"].rsplit("value of ", 1)[1].rstrip("?")
    path = follow(dict(statements), start)
    assert len(path) == depth + 2 and path[-1] == item.answer
    assert item.solution["reasoning"] == "; ".join(f"{a} = {b}" for a, b in pairwise(path))


@given(
    depth=st.integers(1, 12), length=st.sampled_from([0, 800, 60_000]), index=st.integers(0, 10**6)
)
@settings(max_examples=30, deadline=None)
def test_hash_hops_lead_to_the_answer(depth: int, length: int, index: int) -> None:
    item = make("retrieval.hashhop", index, length=length, depth=depth)
    pairs = PAIR.findall(context(item))
    assert len(pairs) == len(dict(pairs)) >= 2 * depth
    start = item.messages[0]["content"].rsplit("from ", 1)[1].rstrip(".")
    path = follow(dict(pairs), start)
    assert len(path) == depth + 1 and path[-1] == item.answer
    assert item.solution["reasoning"].count("=") == depth


def test_answers_tolerate_white_space_and_a_full_stop() -> None:
    item = make("retrieval.single")
    task = tasks.get("retrieval.single")
    assert task.score(item, " ".join(item.answer) + ".") == 1.0


@pytest.mark.parametrize("syllables", [2, 3, 4])
def test_made_up_names_are_distinct_and_of_one_width(syllables: int) -> None:
    names = made_up_names(Random(1), 6400, syllables)
    assert len(set(names)) == 6400
    assert {len(name) for name in names} == {2 * syllables}
