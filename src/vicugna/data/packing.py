"""Rows: fixed-length sequences of training data, each a pure function of (source, seed, row)."""

import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from vicugna.data.cache import TokenFile
from vicugna.errors import VicugnaError


@dataclass
class Row:
    """T+1 tokens; `loss_mask` marks the targets; `positions` restart with each document."""

    tokens: np.ndarray  # int32 [T+1]
    loss_mask: np.ndarray  # bool [T+1]
    positions: np.ndarray  # int32 [T+1]


@dataclass
class Batch:
    """What one training step sees, [B, T] each."""

    tokens_BT: torch.Tensor  # int64, as are positions and targets
    positions_BT: torch.Tensor  # restart at 0 with each document
    targets_BT: torch.Tensor
    weights_BT: torch.Tensor  # float32; 0 where no log-probability of the target is needed


def collate(rows: Sequence[Row]) -> Batch:
    """Rows of T+1 tokens as inputs and next-token targets of T, with weights of 0 or 1."""
    stacked = np.stack([(row.tokens, row.loss_mask, row.positions) for row in rows], 1)
    tokens, mask, positions = torch.from_numpy(stacked).long()
    return Batch(tokens[:, :-1].contiguous(), positions[:, :-1].contiguous(),
                 tokens[:, 1:].contiguous(), mask[:, 1:].float())


def pack(documents: Sequence[tuple[np.ndarray, np.ndarray]], length: int, pad: int) -> Row:
    """Documents (tokens, loss mask) one after another in `length` tokens, then one of pads without
    loss. A document's first token is no target, as another document precedes it."""
    tokens = np.full(length, pad, np.int32)
    mask, positions = np.zeros(length, np.bool_), np.zeros(length, np.int32)
    at = 0
    for ids, loss_mask in documents:
        end = at + len(ids)
        tokens[at:end], mask[at:end], positions[at:end] = ids, loss_mask, np.arange(
            len(ids))
        mask[at], at = False, end
    positions[at:] = np.arange(length - at)
    return Row(tokens, mask, positions)


def _random(seed: int, *path: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *path])))


class FileRows:
    """Rows of a source's `documents`. Each epoch lays them end to end in a new order. Texts are cut
    into windows, in a new order; neighbours share one token, so that every token but the first is a
    target once. Chats are never cut: they are packed whole, next-fit."""

    def __init__(self, source: TokenFile, seq_len: int, seed: int, pad: int, where: str,
                 documents: np.ndarray) -> None:
        self.digest, self._source, self._seed, self._pad = source.digest, source, seed, pad
        self._length, self._lengths = seq_len + 1, np.diff(source.offsets)
        texts, lengths = source.mask is None, self._lengths[documents]
        self._documents = documents if texts else documents[lengths <= self._length]
        if texts and lengths.sum() < self._length:
            raise VicugnaError(f"{lengths.sum()} tokens are fewer than one sequence "
                               f"({seq_len} + 1)", where, "Add text, or make the sequence shorter")
        if not len(self._documents):
            raise VicugnaError(f"every chat is longer than {self._length} tokens (the shortest has "
                               f"{self._lengths.min()})", where, "Make the sequence longer")
        if left_out := len(documents) - len(self._documents):
            print(f"warning: {where}: {left_out} of {len(documents)} chats are longer than "
                  f"{self._length} tokens and are left out", file=sys.stderr)
        self._firsts = [0]  # the first row of each epoch planned so far, and of the next
        self._epoch = lru_cache(maxsize=1)(self._planned)

    def _planned(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The order of documents, where each of them starts, and where each row begins and ends."""
        texts = self._source.mask is None
        order = _random(self._seed, epoch, *[0] * texts).permutation(self._documents)
        starts = np.concatenate([[0], np.cumsum(self._lengths[order])])
        if texts:
            windows = (int(starts[-1]) - 1) // (self._length - 1)
            begins = _random(self._seed, epoch, 1).permutation(windows) * (self._length - 1)
            return order, starts, begins, begins + self._length
        firsts, space = [0], self._length
        for place, n in enumerate(self._lengths[order].tolist()):
            if n > space:
                firsts.append(place)
                space = self._length
            space -= n
        return order, starts, starts[firsts], starts[[*firsts[1:], len(order)]]

    def row(self, k: int) -> Row:
        """Row k; the same for the same k, always."""
        while k >= self._firsts[-1]:
            self._firsts.append(self._firsts[-1] + len(self._epoch(len(self._firsts) - 1)[2]))
        epoch = bisect_right(self._firsts, k) - 1
        order, starts, begins, ends = self._epoch(epoch)
        at, end = int(begins[k - self._firsts[epoch]]), int(ends[k - self._firsts[epoch]])
        place, parts = int(np.searchsorted(starts, at, side="right")) - 1, []
        while at < end:
            n = min(end, int(starts[place + 1])) - at
            first = int(self._source.offsets[order[place]]) + at - int(starts[place])
            span, mask = slice(first, first + n), self._source.mask
            parts.append((self._source.tokens[span], np.ones(n) if mask is None else mask[span]))
            at, place = at + n, place + 1
        return pack(parts, self._length, self._pad)
