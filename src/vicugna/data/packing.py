"""Rows: fixed-length pieces of training data, each a pure function of (source, seed, row)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from vicugna.data.cache import TokenFile
from vicugna.errors import VicugnaError

IGNORED = -100  # a target without loss


@dataclass
class Row:
    """T+1 tokens; `loss_mask` says which are targets; `positions` restart with each document."""

    tokens: np.ndarray  # int32 [T+1]
    loss_mask: np.ndarray  # bool [T+1]
    positions: np.ndarray  # int32 [T+1]


@dataclass
class Batch:
    """What one training step sees. All torch.long; a target of -100 carries no loss."""

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    positions_BT: torch.Tensor


class Rows(Protocol):
    """An endless sequence of rows."""

    digest: str

    def row(self, k: int) -> Row:
        """Row k; the same for the same k, always."""
        ...


def collate(rows: Sequence[Row]) -> Batch:
    """Rows of T+1 tokens as inputs and next-token targets of T."""
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows])).long()
    mask = torch.from_numpy(np.stack([row.loss_mask for row in rows]))
    positions = torch.from_numpy(np.stack([row.positions for row in rows])).long()
    targets = tokens[:, 1:].masked_fill(~mask[:, 1:], IGNORED)
    return Batch(tokens[:, :-1].contiguous(), targets, positions[:, :-1].contiguous())


def pack(documents: Sequence[tuple[np.ndarray, np.ndarray]], length: int, pad: int) -> Row:
    """Documents (tokens, loss mask) one after another in `length` tokens.

    What is left is one last document of pads without loss. A document's first token is never a
    target: what stands before it belongs to another document.
    """
    tokens = np.full(length, pad, np.int32)
    mask, positions = np.zeros(length, np.bool_), np.zeros(length, np.int32)
    at = 0
    for ids, said in documents:
        end = at + len(ids)
        tokens[at:end], mask[at:end] = ids, said
        positions[at:end] = np.arange(len(ids))
        mask[at] = False
        at = end
    positions[at:] = np.arange(length - at)
    return Row(tokens, mask, positions)


def held_out(count: int, split: str) -> np.ndarray:
    """The documents of a file source that belong to `split`, int64: every 50th to dev, the others
    to train. A source of fewer than 50 has no dev documents."""
    index = np.arange(count)
    return index[(index % 50 == 49) == (split == "dev")]


def _random(seed: int, *path: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *path])))


class TextRows:
    """Each epoch: documents in a new order, end to end, cut into windows, in a new order.

    Neighbouring windows share one token, so every token but the first is a target once.
    """

    def __init__(self, source: TokenFile, seq_len: int, seed: int, where: str,
                 documents: np.ndarray) -> None:
        self.digest, self._source, self._length, self._seed = source.digest, source, seq_len, seed
        self._documents = documents
        self._lengths = np.diff(source.offsets)
        tokens = int(self._lengths[documents].sum())
        self.rows_per_epoch = (tokens - 1) // seq_len
        if self.rows_per_epoch == 0:
            raise VicugnaError(f"{tokens} tokens are fewer than one sequence ({seq_len} + 1)",
                               where, "Add text, or make the sequence shorter")
        self._plan: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        plan = self._plan
        if plan is None or plan[0] != epoch:
            order = _random(self._seed, epoch, 0).permutation(self._documents)
            starts = np.concatenate([[0], np.cumsum(self._lengths[order])])
            windows = _random(self._seed, epoch, 1).permutation(self.rows_per_epoch)
            self._plan = plan = (epoch, order, starts, windows)
        return plan[1:]

    def row(self, k: int) -> Row:
        epoch, index = divmod(k, self.rows_per_epoch)
        order, starts, windows = self._epoch(epoch)
        at = int(windows[index]) * self._length
        end = at + self._length + 1
        place = int(np.searchsorted(starts, at, side="right")) - 1
        parts = []
        while at < end:
            document = order[place]
            first = int(self._source.offsets[document]) + at - int(starts[place])
            n = min(end, int(starts[place + 1])) - at
            ids = self._source.tokens[first:first + n]
            parts.append((ids, np.ones(n, np.bool_)))
            at, place = at + n, place + 1
        return pack(parts, self._length + 1, 0)


class ChatRows:
    """Each epoch: whole chats in a new order, packed next-fit. None is ever cut."""

    def __init__(self, source: TokenFile, seq_len: int, seed: int, pad: int, where: str,
                 documents: np.ndarray) -> None:
        self.digest, self._source, self._seed, self._pad = source.digest, source, seed, pad
        self._length = seq_len + 1
        lengths = np.diff(source.offsets)
        self._fitting = documents[lengths[documents] <= self._length]
        self.left_out = len(documents) - len(self._fitting)
        if not len(self._fitting):
            raise VicugnaError(f"every chat is longer than {self._length} tokens (the shortest has "
                               f"{lengths.min()})", where, "Make the sequence longer")
        if self.left_out:
            print(f"warning: {where}: {self.left_out} of {len(documents)} chats are longer than "
                  f"{self._length} tokens and are left out", file=sys.stderr)
        self._lengths = lengths
        self._ends: list[int] = []  # rows up to the end of each epoch planned so far
        self._plan: tuple[int, np.ndarray, list[int]] | None = None

    def _epoch(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """The order of chats, and where each row begins in it."""
        plan = self._plan
        if plan is None or plan[0] != epoch:
            order = _random(self._seed, epoch).permutation(self._fitting)
            begins, room = [0], self._length
            for place, n in enumerate(self._lengths[order].tolist()):
                if n > room:
                    begins.append(place)
                    room = self._length
                room -= n
            self._plan = plan = (epoch, order, [*begins, len(order)])
        return plan[1:]

    def row(self, k: int) -> Row:
        while not self._ends or k >= self._ends[-1]:
            rows = len(self._epoch(len(self._ends))[1]) - 1
            self._ends.append((self._ends[-1] if self._ends else 0) + rows)
        epoch = int(np.searchsorted(self._ends, k, side="right"))
        index = k - (self._ends[epoch - 1] if epoch else 0)
        order, begins = self._epoch(epoch)
        assert self._source.mask is not None
        parts = []
        for document in order[begins[index]:begins[index + 1]]:
            span = slice(self._source.offsets[document], self._source.offsets[document + 1])
            parts.append((self._source.tokens[span], self._source.mask[span]))
        return pack(parts, self._length, self._pad)
