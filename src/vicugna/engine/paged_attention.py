"""Attention over pages in PyTorch: the reference, for any device."""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vicugna.engine.blocks import BLOCK
from vicugna.models.layers.mask import Span, additive

# Queries of a block when a sequence has many: bounds the mask, skips keys that are masked anyway.
QUERIES, WINDOW_QUERIES = 256, 64
# Sequences with one query are attended to in groups, padded to one of these numbers of blocks: a
# sequence's is that of its own length alone, so that its result does not depend on the others.
SIZES = np.array(sorted({size << n for n in range(26) for size in (1, 3)}))


class Group(NamedTuple):
    """Sequences with one query each, which need about as many blocks: the rows of their queries
    (None: all of the batch, in order), tables [r, m], and an additive mask [r, 1, 1, m * 16]."""

    rows: Tensor | None
    tables: Tensor
    mask: Tensor


class Places:
    """Where the tokens of one step are in the pages of one kind of layers.

    starts      [R + 1] rows of the flat batch at which each sequence's tokens begin
    lengths     [R] keys of each sequence, those of this step included
    first       [R] blocks of each that have been given back
    tables      [R, most] its other blocks
    block_N, offset_N   of each token: its block and its place there, int64; as tensors on the
                device `blocks_N`, `offsets_N`, and 16 * block + place is `slots_N`
    """

    def __init__(self, span: Span, table: np.ndarray, first_R: np.ndarray, slots_R: np.ndarray,
                 starts_R: np.ndarray, lengths_R: np.ndarray, row_N: np.ndarray,
                 positions_N: np.ndarray, device: torch.device) -> None:
        self.span, self.device = span, device
        self.starts, self.lengths, self.first = starts_R, lengths_R, first_R
        self.row_N, self.positions_N = row_N, positions_N
        most = int((-(-lengths_R // BLOCK) - first_R).max())
        self.tables = table[slots_R, :most]
        self.block_N, self.offset_N = self._of(row_N, positions_N)

    @cached_property
    def blocks_N(self) -> Tensor:
        return torch.from_numpy(self.block_N).to(self.device)

    @cached_property
    def offsets_N(self) -> Tensor:
        return torch.from_numpy(self.offset_N).to(self.device)

    @cached_property
    def slots_N(self) -> Tensor:
        return torch.from_numpy(self.block_N * BLOCK + self.offset_N).to(self.device)

    def _of(self, row_N: np.ndarray, position_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Blocks and offsets of positions of the sequences `row_N`."""
        block, offset = np.divmod(position_N, BLOCK)
        return self.tables[row_N, block - self.first[row_N]].astype(np.int64), offset

    def earlier_slots(self, n: int) -> Tensor:
        """The slots of the n positions before each token, [N * n], earliest first; those before
        the start are slot 0, which is zero."""
        before = self.positions_N[:, None] - np.arange(n, 0, -1)
        blocks, offsets = self._of(self.row_N[:, None], before.clip(0))
        slots = np.where(before < 0, 0, blocks * BLOCK + offsets)
        return torch.from_numpy(slots.reshape(-1)).to(self.device)

    @cached_property
    def groups(self) -> list[Group]:
        """The sequences with one query, by the blocks that they need."""
        single = np.flatnonzero(np.diff(self.starts) == 1)
        first, length = self.first[single], self.lengths[single]
        sizes = SIZES[np.searchsorted(SIZES, -(-length // BLOCK) - first)]
        groups = []
        for size in np.unique(sizes).tolist():
            r = single[sizes == size]
            tables = np.zeros((len(r), size), np.int64)
            held = min(size, self.tables.shape[1])
            tables[:, :held] = self.tables[r, :held]
            key = self.first[r, None] * BLOCK + np.arange(size * BLOCK)
            last = torch.from_numpy(self.lengths[r, None] - 1)
            mask = self.span.mask(last, torch.from_numpy(key), torch.zeros_like(last))
            whole = len(r) == len(self.lengths)
            groups.append(Group(
                None if whole else torch.from_numpy(self.starts[r]).to(self.device),
                torch.from_numpy(tables).to(self.device),
                additive(mask[:, :, None], torch.float32).to(self.device)))
        return groups

    @cached_property
    def prompts(self) -> list[tuple[int, int, int, int, Tensor]]:
        """The sequences with several queries: begin and end of their rows, first and last key + 1,
        and the blocks of those keys."""
        found = []
        for r in np.flatnonzero(np.diff(self.starts) > 1).tolist():
            first, length = int(self.first[r]), int(self.lengths[r])
            table = self.tables[r, : -(-length // BLOCK) - first].astype(np.int64)
            found.append((int(self.starts[r]), int(self.starts[r + 1]), first * BLOCK, length,
                          torch.from_numpy(table).to(self.device)))
        return found


def paged_attention(q_NHK: Tensor, keys: Tensor | None, values: Tensor, places: Places,
                    scale: float) -> Tensor:
    """Causal attention of the queries of a step over pages: [N, H, U].

    `keys` are [blocks, G, K, 16], `values` [blocks, G, 16, U]; None means that the values are the
    keys too.
    """
    if places.groups and places.groups[0].rows is None:
        return _single(q_NHK, keys, values, places.groups[0], scale)
    out = q_NHK.new_empty(*q_NHK.shape[:2], values.shape[3])
    for group in places.groups:
        out[group.rows] = _single(q_NHK[group.rows], keys, values, group, scale)
    for begin, end, low, length, table in places.prompts:
        v_GSU = values[table].transpose(0, 1).flatten(1, 2)[:, : length - low]
        k_GSK = v_GSU if keys is None else keys[table].permute(1, 0, 3, 2).flatten(1, 2)[
            :, : length - low]
        out[begin:end] = _several(q_NHK[begin:end], k_GSK.to(q_NHK.dtype), v_GSU.to(q_NHK.dtype),
                                  low, places.span, scale)
    return out


def _single(q_RHK: Tensor, keys: Tensor | None, values: Tensor, group: Group, scale: float
            ) -> Tensor:
    """One query a sequence, all sequences of a group at once; in float32."""
    v_RMGSU = values[group.tables].float()
    k_RMGKS = v_RMGSU.transpose(3, 4) if keys is None else keys[group.tables].float()
    R, M, G, S, U = v_RMGSU.shape
    q_R1GhK = (q_RHK.float() * scale).view(R, 1, G, -1, q_RHK.shape[2])
    score_RMGhS = q_R1GhK @ k_RMGKS
    score_RGhMS = score_RMGhS.permute(0, 2, 3, 1, 4).flatten(3) + group.mask
    share_RGhMS = score_RGhMS.softmax(-1).unflatten(3, (M, S))
    out_RMGhU = share_RGhMS.permute(0, 3, 1, 2, 4) @ v_RMGSU
    return out_RMGhU.sum(1).reshape(R, -1, U).to(q_RHK.dtype)


def _several(q_THK: Tensor, k_GSK: Tensor, v_GSU: Tensor, low: int, span: Span, scale: float
             ) -> Tensor:
    """The last T queries of a sequence, in blocks, each over the keys that any of its queries
    attends to; the first key is at position `low`."""
    T, H, _ = q_THK.shape
    G, S, U = v_GSU.shape
    q_HTK, reach = q_THK.transpose(0, 1), span.window or span.chunk
    block = QUERIES if reach is None or reach >= 4 * QUERIES else WINDOW_QUERIES
    if k_GSK.shape[2] != U:  # else PyTorch's CPU kernel would hold all T * S scores
        width = max(k_GSK.shape[2], U)
        q_HTK, k_GSK, v_GSU = (F.pad(x, (0, width - x.shape[2])) for x in (q_HTK, k_GSK, v_GSU))
    position = torch.arange(low, low + S, device=q_THK.device)
    outs = []
    for start in range(0, T, block):
        t = min(block, T - start)
        high = S - T + start + t
        first = 0 if reach is None else max(0, high - t - reach + 1)
        query = position[high - t : high]
        mask = additive(span.mask(query, position[first:high], torch.zeros_like(query)),
                        q_THK.dtype)
        outs.append(F.scaled_dot_product_attention(
            q_HTK[None, :, start : start + t], k_GSK[None, :, first:high],
            v_GSU[None, :, first:high], mask, scale=scale, enable_gqa=H != G))
    return torch.cat(outs, dim=2)[0, :, :, :U].transpose(0, 1)
