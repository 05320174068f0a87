"""Reasoning families wrapped from reasoning-gym: its generators make the instances and its
verifiers judge the answers; the short prompts and the worked solutions are ours.

Source: Stojanovski et al. 2025, "Reasoning Gym", https://github.com/open-thought/reasoning-gym.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

from vicugna.errors import VicugnaError
from vicugna.tasks.task import Difficulty, Item, draw, final_line, make_item

_INDICES = 1 << 48


@dataclass(frozen=True)
class Posed:
    """An instance in our words: question, answer and the worked steps."""

    question: str
    answer: str
    reasoning: str
    index: int = 0


@dataclass(frozen=True)
class Family:
    """One reasoning-gym dataset. `settings` turns a difficulty into its configuration, `pose` an
    instance into our words (None: not wanted), `restore` our form of an answer into theirs."""

    dataset: str
    settings: Callable[[Difficulty], dict[str, Any]]
    pose: Callable[[dict[str, Any]], Posed | None]
    restore: Callable[[str], str] = str
    deepest: int = 100
    exact: bool = False  # their verifier forgives small errors, so the answer must also be ours

    @property
    def name(self) -> str:
        return f"reasoning.{self.dataset}"

    def item(self, seed: int, difficulty: Difficulty) -> Item:
        """`difficulty.depth` sets the number of terms, numbers, letters, words or animals.

        metadata: "index", the instance's place in the reasoning-gym dataset.
        """
        data = self._data(difficulty)

        def propose(rng: Random) -> Posed | None:
            index = rng.randrange(_INDICES)
            posed = self.pose(data[index])
            return posed and Posed(posed.question, posed.answer, posed.reasoning, index)

        posed, _ = draw(self.name, seed, difficulty, propose, lambda posed: posed.question)
        return make_item(
            self.name, seed, difficulty, posed.question, posed.answer, posed.reasoning,
            {"index": posed.index},
        )  # fmt: skip

    def score(self, item: Item, response: str) -> float:
        """1.0 when reasoning-gym's verifier gives the last line full marks; no partial marks, which
        would reward an answer for being long or nearly right."""
        data = self._data(item.difficulty)
        answer = final_line(response)
        if not answer or (self.exact and answer != item.answer):
            return 0.0
        entry = data[item.metadata["index"]]
        return float(data.score_answer(self.restore(answer), entry) >= 1.0)

    def _data(self, difficulty: Difficulty) -> Any:
        if difficulty.depth > self.deepest:
            raise VicugnaError(
                f"depth is {difficulty.depth}", self.name, f"Use at most {self.deepest}"
            )
        return _dataset(self.dataset, tuple(self.settings(difficulty).items()))


@lru_cache(maxsize=256)
def _dataset(name: str, settings: tuple[tuple[str, Any], ...]) -> Any:
    """A dataset whose instances are pure functions of their index; reading the word lists is slow,
    and so is the import (two seconds: it loads sympy), so both wait for the first item."""
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=_INDICES, **dict(settings))


def _numbered(things: list[str]) -> str:
    return " ".join(f"{i} {thing}" for i, thing in enumerate(things, 1))


def _listed(response: str) -> str:
    """'3 19' as reasoning-gym wants lists: "['3', '19']"; the word none is the empty list."""
    return str([] if response == "none" else response.split())


def _pose_chain_sum(entry: dict[str, Any]) -> Posed | None:
    """Left to right; chains that dip below zero are not wanted."""
    parts = entry["metadata"]["expression"].split()
    total, steps = int(parts[0]), []
    for sign, term in zip(parts[1::2], parts[2::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        if after < 0:
            return None
        steps.append(f"{total}{sign}{term}={after}")
        total = after
    return Posed(f"Compute {' '.join(parts)}.", str(total), "; ".join(steps))


def _pose_number_sorting(entry: dict[str, Any]) -> Posed:
    """Selection sort: each step names the next number and what is left."""
    numbers = [int(float(number)) for number in entry["metadata"]["original_numbers"]]
    direction = entry["metadata"]["direction"]
    rest, steps = list(numbers), []
    for number in sorted(numbers, reverse=direction == "descending"):
        rest.remove(number)
        steps.append(" ".join([str(number), "|", *map(str, rest)]).rstrip(" |"))
    answer = " ".join(step.split()[0] for step in steps)
    return Posed(f"Sort {direction}: {' '.join(map(str, numbers))}", answer, "; ".join(steps))


def _pose_number_filtering(entry: dict[str, Any]) -> Posed:
    meta = entry["metadata"]
    kept, steps = list(meta["result"]), []
    for number in meta["original_numbers"]:
        steps.append(f"{number} {'yes' if number in kept else 'no'}")
    verb, than = meta["operation"].split("_")
    question = f"{verb.capitalize()} numbers {than} than {meta['filter_value']}: "
    question += " ".join(meta["original_numbers"])
    return Posed(question, " ".join(kept) or "none", "; ".join(steps))


def _pose_spell_backward(entry: dict[str, Any]) -> Posed:
    letters = list(entry["metadata"]["word"].lower())
    question = f"Spell backward: {' '.join(letters)}"
    return Posed(question, " ".join(reversed(letters)), _numbered(letters))


def _pose_word_reversal(entry: dict[str, Any]) -> Posed:
    words = entry["metadata"]["words"]
    return Posed(f"Reverse the words: {' '.join(words)}", " ".join(words[::-1]), _numbered(words))


def _pose_leg_counting(entry: dict[str, Any]) -> Posed:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    animals, total, steps = entry["metadata"]["animals"], 0, []
    for animal, count in animals.items():
        legs = count * ANIMALS[animal]
        steps.append(
            f"{count} {animal} {count}*{ANIMALS[animal]}={legs} {total}+{legs}={total + legs}"
        )
        total += legs
    listed = ", ".join(f"{count} {animal}" for animal, count in animals.items())
    return Posed(f"How many legs: {listed}?", str(total), "; ".join(steps))


def _pose_ab(entry: dict[str, Any]) -> Posed | None:
    """The states on the way, leftmost pair first; programs that vanish are not wanted."""
    from reasoning_gym.algorithmic.ab import compute_steps

    program = entry["question"].split("program:\n\n")[1].split("\n")[0]
    states = [" ".join(state) for state in compute_steps(program.split())[0]]
    if not states[-1]:
        return None
    return Posed(f"Rewrite the A::B program: {program}", states[-1], "; ".join(states[1:]))


def _between(what: str, n: int) -> dict[str, int]:
    return {f"min_{what}": n, f"max_{what}": n}


def _numbers(difficulty: Difficulty) -> dict[str, Any]:
    return {
        **_between("numbers", difficulty.depth + 2), **_between("decimals", 0),
        "min_value": 0, "max_value": 99,
    }  # fmt: skip


FAMILIES: list[Family] = [
    Family(  # `count` is the number of digits of the longest terms
        "chain_sum",
        lambda d: {
            **_between("terms", d.depth + 2),
            "min_digits": 1,
            "max_digits": max(1, d.count),
        },
        _pose_chain_sum,
    ),
    Family("number_sorting", _numbers, _pose_number_sorting, _listed, exact=True),
    Family("number_filtering", _numbers, _pose_number_filtering, _listed),
    Family(
        "spell_backward",
        lambda d: _between("word_len", d.depth + 2),
        _pose_spell_backward,
        lambda response: response.replace(" ", ""),
        deepest=8,
        exact=True,
    ),
    Family(
        "word_sequence_reversal",
        lambda d: _between("words", d.depth + 2),
        _pose_word_reversal,
        lambda response: response.replace(" ", ", "),
    ),
    Family(
        "leg_counting",
        lambda d: {**_between("animals", d.depth + 1), "min_instances": 1, "max_instances": 9},
        _pose_leg_counting,
        deepest=36,
    ),
    Family("ab", lambda d: {"length": d.depth + 4}, _pose_ab, deepest=60),
]
