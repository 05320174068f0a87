"""Reasoning families wrapped from reasoning-gym: its generators make the instances and its
verifiers judge the answers; the short prompts and the worked solutions are ours.

Source: Stojanovski et al. 2025, "Reasoning Gym", https://github.com/open-thought/reasoning-gym.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

from vicugna.errors import VicugnaError
from vicugna.tasks.task import Difficulty, Item, Posed, draw, final_line, make_item

_INDICES = 1 << 48


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
        """`difficulty.depth` sets the number of terms, numbers, letters or words.

        metadata: "index", the instance's place in the reasoning-gym dataset.
        """
        data = self._data(difficulty)

        def propose(rng: Random) -> tuple[Posed, int] | None:
            index = rng.randrange(_INDICES)
            posed = self.pose(data[index])
            return posed and (posed, index)

        (posed, index), _ = draw(self.name, seed, difficulty, propose, lambda one: one[0].question)
        return make_item(self.name, seed, difficulty, posed, {"index": index})

    def score(self, item: Item, response: str) -> float:
        """1.0 when reasoning-gym's verifier gives the last line full marks; no partial marks, which
        would reward an answer for being long or nearly right."""
        answer = final_line(response)
        if not answer or (self.exact and answer != item.answer):
            return 0.0
        data = self._data(item.difficulty)
        entry = data[item.metadata["index"]]
        return float(data.score_answer(self.restore(answer), entry) >= 1.0)

    def _data(self, difficulty: Difficulty) -> Any:
        if difficulty.depth > self.deepest:
            raise VicugnaError(f"depth is {difficulty.depth}", self.name,
                               f"Use at most {self.deepest}")
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
    kept = list(meta["result"])
    steps = [f"{number} {'yes' if number in kept else 'no'}" for number in meta["original_numbers"]]
    verb, than = meta["operation"].split("_")
    question = (f"{verb.capitalize()} numbers {than} than {meta['filter_value']}: "
                f"{' '.join(meta['original_numbers'])}")
    return Posed(question, " ".join(kept) or "none", "; ".join(steps))


def _pose_spell_backward(entry: dict[str, Any]) -> Posed:
    letters = list(entry["metadata"]["word"].lower())
    return Posed(f"Spell backward: {' '.join(letters)}", " ".join(letters[::-1]),
                 _numbered(letters))


def _pose_word_reversal(entry: dict[str, Any]) -> Posed:
    words = entry["metadata"]["words"]
    return Posed(f"Reverse the words: {' '.join(words)}", " ".join(words[::-1]), _numbered(words))


def _between(what: str, n: int) -> dict[str, int]:
    return {f"min_{what}": n, f"max_{what}": n}


def _numbers(difficulty: Difficulty) -> dict[str, Any]:
    return {**_between("numbers", difficulty.depth + 2), **_between("decimals", 0),
            "min_value": 0, "max_value": 99}


FAMILIES = [
    Family("chain_sum",  # `count` is the number of digits of the longest terms
           lambda d: {**_between("terms", d.depth + 2), "min_digits": 1,
                      "max_digits": max(1, d.count)},
           _pose_chain_sum),
    Family("number_sorting", _numbers, _pose_number_sorting, _listed, exact=True),
    Family("number_filtering", _numbers, _pose_number_filtering, _listed),
    Family("spell_backward", lambda d: _between("word_len", d.depth + 2), _pose_spell_backward,
           lambda response: response.replace(" ", ""), deepest=8, exact=True),
    Family("word_sequence_reversal", lambda d: _between("words", d.depth + 2), _pose_word_reversal,
           lambda response: response.replace(" ", ", ")),
]
