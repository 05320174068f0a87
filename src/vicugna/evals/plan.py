"""The evaluation plan: the items, frozen before the first token; the denominator of all scores."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date as Date
from itertools import product
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vicugna import chat, tasks
from vicugna.errors import VicugnaError, did_you_mean
from vicugna.files import digest_of
from vicugna.tasks import Difficulty, Item, Task
from vicugna.tokenizer import Tokenizer


@dataclass(frozen=True)
class Spec:
    """`n` items of one task at one difficulty. `length_tokens` sets the difficulty's length so that
    the rendered prompt has that many tokens or at most 5% (16 where that is more) fewer."""

    group: str
    task: str
    n: int
    split: str = "test"
    difficulty: Difficulty = field(default_factory=Difficulty)
    length_tokens: int = 0
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if min(self.n, self.max_new_tokens, self.length_tokens + 1) < 1:
            raise ValueError("n, max_new_tokens and length_tokens must be positive")


_SPEC = TypeAdapter(Spec)


@dataclass(frozen=True)
class PlannedItem:
    """One item. `cluster` names what it shares with others ("" for nothing), `prompt_tokens` is
    the length of its prompt, `question_digest` the digest of its messages."""

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
        """A digest of all fields."""
        return digest_of(asdict(self))[:16]

    @property
    def row(self) -> tuple[str, str, str]:
        """Its row of the results: group, task, and the difficulty where it is not the default."""
        words = [f"{self.length_tokens} tokens"] if self.length_tokens else []
        usual = {**asdict(Difficulty()), **({"length": self.difficulty.length} if words else {})}
        words += [f"{key} {value}" for key, value in asdict(self.difficulty).items()
                  if value != usual[key]]
        return self.group, self.task, ", ".join(words) or "default"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "PlannedItem":
        """From asdict() or an item's record; other keys are ignored."""
        own = {f.name: content[f.name] for f in fields(cls)}
        return cls(**{**own, "difficulty": Difficulty(**own["difficulty"])})


@dataclass(frozen=True)
class Plan:
    """The items in the order in which they are asked, and the date that chat templates see."""

    items: list[PlannedItem]
    date: Date

    @property
    def digest(self) -> str:
        """The digest of the date and all items, order included."""
        return digest_of({"date": self.date.isoformat(), "items": list(map(asdict, self.items))})


def grid(content: Mapping[str, Any]) -> list[Spec]:
    """The specs of one eval group of a recipe: lists in `length_tokens` and `difficulty` mean each
    value with each of the others. Raises VicugnaError for keys and values not known."""
    axes = {"length_tokens": 0, "difficulty": {}, **content}
    where, difficulty = f"eval group {content.get('group', '(unnamed)')!r}", axes["difficulty"]
    if not isinstance(difficulty, Mapping):
        raise VicugnaError("difficulty is not a mapping", where, "Correct this group")
    for keys, kind in ((axes, Spec), (difficulty, Difficulty)):
        known = [one.name for one in fields(kind)]
        for key in keys.keys() - {*known}:
            raise VicugnaError(f"unknown key {key!r}", where, did_you_mean(key, known))
    each = [value if isinstance(value, list) else [value]
            for value in (axes["length_tokens"], *difficulty.values())]
    try:
        return [_SPEC.validate_python({**axes, "length_tokens": length, "difficulty": dict(
            zip(difficulty, values, strict=True))}) for length, *values in product(*each)]
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        message = f"{key}: {first['msg']}".removeprefix(": Value error, ")
        raise VicugnaError(message, where, "Correct this group") from error


def build_plan(groups: Iterable[Mapping[str, Any]], tokenizer: Tokenizer, date: Date) -> Plan:
    """Plan the items of every group: always the first `n` seeds of its split."""
    items = []
    for spec in [spec for group in groups for spec in grid(group)]:
        task, guess = tasks.get(spec.task), spec.length_tokens * 3
        for index in range(spec.n):
            seed, difficulty = tasks.split_seed(spec.split, index), spec.difficulty
            if spec.length_tokens:
                difficulty = _fit_length(task, seed, replace(difficulty, length=guess), spec,
                                         tokenizer, date)
                guess = difficulty.length
            items.append(plan_item(spec.group, task.item(seed, difficulty), spec.max_new_tokens,
                                   tokenizer, date, spec.length_tokens))
    return sort_plan(items, date)


def plan_item(group: str, item: Item, max_new_tokens: int, tokenizer: Tokenizer, date: Date,
              length_tokens: int = 0) -> PlannedItem:
    """Plan one item; its cluster is metadata["cluster"], if the task gives one."""
    return PlannedItem(group, item.task, item.seed, item.difficulty, max_new_tokens, length_tokens,
                       str(item.metadata.get("cluster", "")),
                       _prompt_tokens(item, tokenizer, date), digest_of(item.messages))


def _prompt_tokens(item: Item, tokenizer: Tokenizer, date: Date) -> int:
    """The length of the rendered prompt; 0 if the template refuses it, which will be its error."""
    try:
        return len(chat.encode(tokenizer, item.messages, date=date))
    except VicugnaError:
        return 0


def sort_plan(items: Iterable[PlannedItem], date: Date) -> Plan:
    """The items by prompt length; VicugnaError if there is none, or a row has one twice."""
    plan = sorted(items, key=lambda item: (item.prompt_tokens, item.max_new_tokens, item.id))
    if not plan:
        raise VicugnaError("nothing to evaluate", "the evaluation plan", "Add an eval group")
    for (row, seed), times in Counter((item.row, item.seed) for item in plan).items():
        if times > 1:
            raise VicugnaError(f"seed {seed} of {row[1]} is asked twice", f"eval group {row[0]!r}",
                               "Give each difficulty once")
    return Plan(plan, date)


def split_batches(plan: Sequence[PlannedItem], batch_size: int, batch_tokens: int
                  ) -> list[list[PlannedItem]]:
    """The plan in consecutive batches of at most `batch_size` items and, unless one item alone has
    more, `batch_tokens` tokens of prompts and replies, padding included."""
    batches: list[list[PlannedItem]] = []
    for item in plan:
        grown = [*batches.pop(), item] if batches else [item]
        longest = max(one.prompt_tokens + one.max_new_tokens for one in grown)
        if len(grown) > 1 and (len(grown) > batch_size or longest * len(grown) > batch_tokens):
            batches += [grown[:-1], [item]]
        else:
            batches.append(grown)
    return batches


def _fit_length(task: Task, seed: int, difficulty: Difficulty, spec: Spec, tokenizer: Tokenizer,
                date: Date) -> Difficulty:
    """The difficulty with a length, in characters, that fills `spec.length_tokens` tokens."""
    target, low, high, nearest = spec.length_tokens, 0, 0, 0
    for _ in range(40):
        count = _prompt_tokens(task.item(seed, difficulty), tokenizer, date)
        if not count or target - max(0.05 * target, 16) <= count <= target:
            return difficulty
        length = difficulty.length
        low, high = (low, length) if count > target else (length, high)
        nearest = min(nearest, count, key=lambda size: abs(size - target))
        guess = round(length * 0.975 * target / count)
        if guess <= low or (high and guess >= high):
            guess = (low + high) // 2 if high else 2 * low + 1
        difficulty = replace(difficulty, length=guess)
    raise VicugnaError(f"{spec.task} cannot fill {target} tokens (nearest: {nearest})",
                       f"eval group {spec.group!r}", "Choose another length_tokens or task")
