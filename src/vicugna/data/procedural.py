"""Rows of procedural items: questions with worked solutions, generated on the fly."""

import hashlib
from datetime import date as Date
from functools import cached_property
from random import Random

import numpy as np

from vicugna import chat, files, tasks
from vicugna.data.packing import Row, pack
from vicugna.data.sources import TASK, Amount, SourceSpec
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer

_TRIES = 32


def _draw(rng: Random, amount: Amount) -> float:
    if not isinstance(amount, list):
        return amount
    whole = all(isinstance(bound, int) for bound in amount)
    return rng.randint(*map(int, amount)) if whole else rng.uniform(*amount)


def draw_item(spec: SourceSpec, split: str, seed: int, k: int, j: int,
              length: int | None = None) -> tasks.Item:
    """Item j of row k, of `split`; its context has `length` characters if given."""
    name = f"{seed}/{spec.source}/{spec.difficulty}/{k}/{j}"
    rng = Random(name)
    drawn = {key: _draw(rng, amount) for key, amount in spec.difficulty.items()}
    tokens = drawn.pop("length_tokens", None)
    if tokens is not None:
        drawn["length"] = int(3 * tokens) if length is None else length
    index = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % (1 << 40)
    task = tasks.get(spec.source.removeprefix(TASK))
    return task.item(tasks.split_seed(split, index), tasks.Difficulty(**drawn))  # type: ignore[arg-type]


def as_text(item: tasks.Item) -> str:
    """An item as a plain document: question, worked steps, answer."""
    asked = [message["content"] for message in item.messages]
    worked = (item.solution.get("reasoning"), item.solution["content"])
    return "\n".join([*asked, *filter(None, worked)])


class TaskRows:
    """Row k holds items (k, 0), (k, 1), ... of `split`, until the next does not fit."""

    def __init__(self, spec: SourceSpec, tokenizer: Tokenizer, seq_len: int, seed: int,
                 split: str, pad: int, date: Date | None = None) -> None:
        self._spec, self._split, self._tokenizer, self._pad = spec, split, tokenizer, pad
        self._date = date
        self._seed, self._length = seed, seq_len + 1
        self.digest = files.digest_of([spec.model_dump(exclude={"weight"}),
                                       chat.digest(tokenizer, date)])
        least = spec.difficulty.get("length_tokens", 0)
        self._least = least[0] if isinstance(least, list) else least
        if self._least > self._length:
            raise VicugnaError(f"length_tokens is {self._least} but a row holds {self._length}",
                               spec.source, "Make the sequence longer or length_tokens smaller")

    def row(self, k: int) -> Row:
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        space, j = self._length, 0
        while space > 0:
            part = self._fitted(k, j, space)
            j += 1
            if part is not None:
                parts.append(part)
                space -= len(part[0])
            elif parts:
                break
            elif j == _TRIES:
                raise VicugnaError(f"{_TRIES} items in a row are longer than {self._length} tokens",
                                   self._spec.source, "Make the sequence longer or items easier")
        return pack(parts, self._length, self._pad)

    def _fitted(self, k: int, j: int, space: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Item (k, j) as tokens and loss mask; None when it has more than `space` tokens."""
        if space < self._least:
            return None
        wanted = self._spec.difficulty.get("length_tokens", 0)
        target = min(_draw(Random(f"{self._seed}/{k}/{j}"), wanted), space)
        slope, fixed = self._characters if wanted else (0.0, 0.0)
        length = max(0, int((target - fixed) * slope))
        for _ in range(4):
            part = self._made(k, j, length)
            if len(part[0]) <= space:
                return part
            if length == 0:
                break
            length = max(0, int(length - (len(part[0]) - target + 4) * slope))
        return None

    @cached_property
    def _characters(self) -> tuple[float, float]:
        """(characters per token of context, tokens of an item beside it), by trying a few."""
        short, long = 500, max(1000, 3 * self._length)
        tokens = [sum(len(self._made(-1, j, n)[0]) for j in range(4)) / 4 for n in (short, long)]
        slope = (long - short) / max(1.0, tokens[1] - tokens[0])
        return slope, max(0.0, tokens[0] - short / slope)

    def _made(self, k: int, j: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        item = draw_item(self._spec, self._split, self._seed, k, j, length)
        if self._spec.form == "text":
            ids = [self._tokenizer.bos_id, *self._tokenizer.encode(as_text(item)),
                   self._tokenizer.eos_ids[0]]
            mask = [True] * len(ids)
        else:
            try:
                ids, mask = chat.encode_training(self._tokenizer,
                                                 [*item.messages, item.solution], date=self._date)
            except VicugnaError as error:
                raise VicugnaError(error.what, f"{self._spec.source}, {error.where}",
                                   error.fix) from error
        return np.asarray(ids, np.int32), np.asarray(mask, np.bool_)
