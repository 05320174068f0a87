"""What will be asked, frozen before the first token: the denominator of every score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise, product
from typing import Any

from vicugna import tasks
from vicugna.errors import VicugnaError
from vicugna.files import digest_of
from vicugna.tasks import Difficulty, Item, Task
from vicugna.tokenizer import Tokenizer

FITTING_TRIES = 40


@dataclass(frozen=True)
class Spec:
    """`n` items of one task at one difficulty, asked of the model under the name `group`.

    `length_tokens` sets the difficulty's length so that the rendered prompt has that many tokens
    or at most 5% (16 where that is more) fewer.
    """

    group: str
    task: str
    n: int
    split: str = "test"
    difficulty: dict[str, Any] = field(default_factory=dict)
    length_tokens: int = 0
    max_new_tokens: int = 64

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Spec:
        """Read one entry of a recipe's eval section; VicugnaError for keys and values not known."""
        try:
            spec = cls(**content)
            Difficulty(**spec.difficulty)
            if min(spec.n, spec.max_new_tokens, spec.length_tokens + 1) < 1:
                raise ValueError("n, max_new_tokens and length_tokens must be positive")
        except (TypeError, ValueError) as error:
            raise VicugnaError(str(error), f"eval group {content.get('group', '(unnamed)')!r}",
                               "Correct this group") from error
        return spec


@dataclass(frozen=True)
class PlannedItem:
    """One question. `cluster` is what it shares with others ("" for nothing), `prompt_tokens` its
    rendered length, `question_digest` the digest of its messages."""

    group: str
    task: str
    seed: int
    difficulty: Difficulty
    max_new_tokens: int
    length_tokens: int = 0
    cluster: str = ""
    prompt_tokens: int = 0
    question_digest: str = ""

    @property
    def id(self) -> str:
        """The item's name: a digest of everything that was planned about it."""
        return digest_of(asdict(self))[:16]

    @property
    def row(self) -> tuple[str, str, str]:
        """Where the results table counts it: group, task, and difficulty in words (what differs
        from the default)."""
        words = [f"{self.length_tokens} tokens"] if self.length_tokens else []
        for f in fields(Difficulty):
            value = getattr(self.difficulty, f.name)
            if value != f.default and not (f.name == "length" and self.length_tokens):
                words.append(f"{f.name} {value}")
        return self.group, self.task, ", ".join(words) or "default"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PlannedItem:
        """Read back from asdict() or from an item's record, whose other keys are left aside."""
        own = {f.name: content[f.name] for f in fields(cls)}
        return cls(**{**own, "difficulty": Difficulty(**own["difficulty"])})


def plan_digest(plan: Iterable[PlannedItem]) -> str:
    """The digest of a whole plan, order included."""
    return digest_of([asdict(item) for item in plan])


def grid(content: Mapping[str, Any]) -> list[Spec]:
    """The specs of one entry of a recipe's eval section: lists in `length_tokens` and in
    `difficulty` mean each of their values, with each of the others."""
    def each(value: Any) -> list[Any]:
        return value if isinstance(value, list) else [value]

    difficulty = content.get("difficulty", {})
    if not isinstance(difficulty, Mapping):
        return [Spec.from_dict(content)]
    return [Spec.from_dict({**content, "length_tokens": length,
                            "difficulty": dict(zip(difficulty, values, strict=True))})
            for length in each(content.get("length_tokens", 0))
            for values in product(*map(each, difficulty.values()))]


def build_plan(specs: Iterable[Spec | Mapping[str, Any]], tokenizer: Tokenizer
               ) -> list[PlannedItem]:
    """Draw the items of every spec: the first `n` seeds of its split, never a chosen few."""
    plan = []
    for spec in [s for given in specs
                 for s in ([given] if isinstance(given, Spec) else grid(given))]:
        task, guess = tasks.get(spec.task), spec.length_tokens * 3
        for index in range(spec.n):
            seed, difficulty = tasks.split_seed(spec.split, index), Difficulty(**spec.difficulty)
            if spec.length_tokens:
                difficulty = _fitted(task, seed, replace(difficulty, length=guess), spec, tokenizer)
                guess = difficulty.length
            plan.append(planned(spec.group, task.item(seed, difficulty), spec.max_new_tokens,
                                tokenizer, spec.length_tokens))
    return in_order(plan)


def planned(group: str, item: Item, max_new_tokens: int, tokenizer: Tokenizer,
            length_tokens: int = 0) -> PlannedItem:
    """Plan to ask `item`; metadata["cluster"], where a task gives it, names what it shares."""
    return PlannedItem(group, item.task, item.seed, item.difficulty, max_new_tokens, length_tokens,
                       str(item.metadata.get("cluster", "")), len(tokenizer.chat(item.messages)),
                       digest_of(item.messages))


def in_order(plan: Iterable[PlannedItem]) -> list[PlannedItem]:
    """The plan by length, so that a batch holds prompts of like length.

    Raises VicugnaError for an empty plan and for a question that one row would count twice.
    """
    plan = sorted(plan, key=lambda item: (item.prompt_tokens, item.max_new_tokens, item.id))
    if not plan:
        raise VicugnaError("nothing to evaluate", "the evaluation plan", "Add an eval group")
    for one, other in pairwise(sorted((item.row, item.seed) for item in plan)):
        if one == other:
            raise VicugnaError(f"seed {one[1]} of {one[0][1]} is asked twice",
                               f"eval group {one[0][0]!r}", "Give each difficulty once")
    return plan


def slices(plan: Sequence[PlannedItem], batch_size: int, batch_tokens: int
           ) -> list[list[PlannedItem]]:
    """The plan in consecutive batches of at most `batch_size` items and, unless one item alone has
    more, `batch_tokens` tokens of prompts and replies, padding included."""
    batches: list[list[PlannedItem]] = []
    longest = 0
    for item in plan:
        longest = max(longest, item.prompt_tokens + item.max_new_tokens)
        size = len(batches[-1]) if batches else 0
        if not size or size == batch_size or longest * (size + 1) > batch_tokens:
            batches.append([])
            longest = item.prompt_tokens + item.max_new_tokens
        batches[-1].append(item)
    return batches


def _fitted(task: Task, seed: int, difficulty: Difficulty, spec: Spec,
            tokenizer: Tokenizer) -> Difficulty:
    """The difficulty with a length, in characters, that fills `spec.length_tokens` tokens."""
    target, low, high, nearest = spec.length_tokens, 0, 0, 0
    for _ in range(FITTING_TRIES):
        count = len(tokenizer.chat(task.item(seed, difficulty).messages))
        if target - max(0.05 * target, 16) <= count <= target:
            return difficulty
        length = difficulty.length
        low, high = (low, length) if count > target else (length, high)
        nearest = count if abs(count - target) < abs(nearest - target) else nearest
        guess = round(length * 0.975 * target / count)
        if guess <= low or (high and guess >= high):
            guess = (low + high) // 2 if high else 2 * low + 1
        difficulty = replace(difficulty, length=guess)
    raise VicugnaError(f"{spec.task} cannot fill {target} tokens (nearest: {nearest})",
                       f"eval group {spec.group!r}", "Choose another length_tokens or task")
