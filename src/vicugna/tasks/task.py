"""What a task is, and the two safeguards that keep training away from test items.

The first is the seed: each split has a range of seeds of its own. The second is the content: an
item is rejection sampled from its seed's random stream until the hash of the candidate's content
(its question, or its needle) falls into the part of hash space that belongs to the seed's split.
So two splits never share a question, whatever the seeds and the difficulty.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple, Protocol, TypeVar

from vicugna.errors import VicugnaError

T = TypeVar("T")

_SEEDS = 1 << 40  # seeds in each split
SPLITS = {split: range(i * _SEEDS, (i + 1) * _SEEDS)
          for i, split in enumerate(("train", "dev", "test", "heldout"))}
# Eighths of hash space: half of all contents may be trained on, the rest never.
_SPLIT_OF_EIGHTH = (*["train"] * 4, "dev", "test", "test", "heldout")
_TRIES = 4000


@dataclass(frozen=True)
class Difficulty:
    """How hard an item is; each task says which of these it uses.

    `length` is the approximate number of characters of the question, `depth` the number of hops or
    steps, `count` the number of distractors (or the size of a reasoning item's objects), `position`
    where the needle stands, from 0 (start) to 1 (end); None means anywhere.
    """

    length: int = 0
    depth: int = 1
    count: int = 1
    position: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("length", 0), ("depth", 1), ("count", 0)):
            if getattr(self, name) < least:
                raise VicugnaError(f"{name} is {getattr(self, name)}", "difficulty",
                                   f"Use at least {least}")
        if self.position is not None and not 0.0 <= self.position <= 1.0:
            raise VicugnaError(f"position is {self.position}", "difficulty",
                               "Use a number from 0 to 1, or none")


@dataclass(frozen=True)
class Item:
    """One question. `solution` is the assistant message that teaches it: its content is the answer,
    and its "reasoning", where present, the worked steps."""

    task: str
    seed: int
    difficulty: Difficulty
    messages: list[dict[str, str]]
    answer: str
    solution: dict[str, str]
    metadata: dict[str, Any] = field(default_factory=dict)


class Problem(NamedTuple):
    """The text of an item; `reasoning` is the worked steps, "" for none."""

    question: str
    answer: str
    reasoning: str


class Task(Protocol):
    """Makes items and scores answers, for training data, reward and evaluation alike."""

    @property
    def name(self) -> str: ...

    def item(self, seed: int, difficulty: Difficulty) -> Item:
        """A pure function: the same item for the same arguments, on every machine."""
        ...

    def score(self, item: Item, response: str) -> float:
        """0.0 or 1.0 for an answer whose reasoning has been split off."""
        ...


def split_seed(split: str, index: int) -> int:
    """The `index`-th seed of a split. Raises VicugnaError for an unknown split or index."""
    if split not in SPLITS:
        raise VicugnaError(f'no split "{split}"', "tasks", f"Use one of {', '.join(SPLITS)}")
    if not 0 <= index < _SEEDS:
        raise VicugnaError(f"index {index} is outside the split", split, f"Stay below {_SEEDS}")
    return SPLITS[split][index]


def split_of(seed: int) -> str:
    """The split of a seed. Raises VicugnaError for a seed outside all of them."""
    for split, seeds in SPLITS.items():
        if seed in seeds:
            return split
    raise VicugnaError(f"seed {seed} is in no split", "tasks", "Take seeds from split_seed()")


def split_of_content(task: str, content: str) -> str:
    """The split that alone may use this content of this task."""
    digest = hashlib.sha256(f"{task}\n{content}".encode()).digest()
    return _SPLIT_OF_EIGHTH[digest[0] % 8]


def rejection_sample(task: str, seed: int, difficulty: Difficulty,
                     generate: Callable[[Random], T | None], content: Callable[[T], str]
                     ) -> tuple[T, Random]:
    """The first candidate whose content belongs to the seed's split, and the stream after it.

    `generate` may return None for a candidate to be discarded. Raises VicugnaError when thousands
    of candidates bring none: this difficulty has too few distinct items.
    """
    split = split_of(seed)
    rng = Random(f"{task}/{seed}/{difficulty}")
    for _ in range(_TRIES):
        candidate = generate(rng)
        if candidate is not None and split_of_content(task, content(candidate)) == split:
            return candidate, rng
    raise VicugnaError(f"no {split} item found in {_TRIES} tries at {difficulty}", task,
                       "Use a greater depth")


def make_item(task: str, seed: int, difficulty: Difficulty, problem: Problem,
              metadata: dict[str, Any]) -> Item:
    """An item with one user message; the solution has no "reasoning" where there is none."""
    solution = {"role": "assistant", "content": problem.answer}
    if problem.reasoning:
        solution["reasoning"] = problem.reasoning
    return Item(task, seed, difficulty, [{"role": "user", "content": problem.question}],
                problem.answer, solution, metadata)


def lines_of(text: str) -> list[str]:
    """The lines that are not blank, with runs of white space made single spaces."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def final_line(response: str) -> str:
    """The last of `lines_of` a response, "" if there is none."""
    return "".join(lines_of(response)[-1:])
