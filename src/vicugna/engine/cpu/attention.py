"""Attention of a step's queries over pages of keys and values: the operation `attend`.

Keys are [blocks, G, K, 16]: one vector holds the scores of 16 keys. Values are [blocks, G, 16, U].
A tile has 4 rows (the last may be repeated), a row being a query of a head that shares the tile's
keys. Keys go by segments of 512, counted from the start of the sequence; a segment's softmax and
its sum of values are added to those before. What a row computes depends on its own keys alone, so
its bits are the same alone, in any batch, and however a prompt is split.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vicugna.engine.cpu import vectors as v
from vicugna.engine.cpu.compiler import Operation, kernel, not_inlined, procedure, template
from vicugna.engine.cpu.threads import Instruction, program, run

L = v.L
BLOCK = 16  # keys of a page
SEGMENT = 512  # keys
ROWS = 4  # of a tile
WIDTH = 2  # vectors of values at once
NOTHING = np.float32(-np.inf)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

f32 = np.float32


def paged(q_NHK: Tensor, keys: Tensor | None, values: Tensor, query_start: np.ndarray,
          lengths: np.ndarray, tables: np.ndarray, first_block: np.ndarray, window: int | None,
          chunk: int | None, scale: float) -> Tensor:
    """Causal attention of N queries over pages, [N, H, U] in the queries' dtype, summed in float32.

    `keys` are [blocks, G, K, 16] and `values` [blocks, G, 16, U], contiguous, of one dtype
    (float32, bfloat16, float16); `keys` None means that the values are the keys too. Sequence r has
    the queries from row query_start[r] to query_start[r + 1], its last, and lengths[r] keys with
    theirs; its blocks are tables[r], of which the first is its block number first_block[r].
    K is a multiple of 16, U of two vectors (`takes`).
    """
    N, H, K = q_NHK.shape
    G, U = values.shape[1], values.shape[3]
    q, out = q_NHK.detach().float().contiguous(), torch.empty(N, H, U)
    scratch, metadata = scratch_of(K), Metadata(query_start, lengths, tables, first_block)
    run(program([Instruction(attend(DTYPES[values.dtype], keys is None), (
        q.data_ptr(), 4 * H * K, 0 if keys is None else keys.data_ptr(), values.data_ptr(),
        metadata.address, H, G, K, U, window or 0, chunk or 0, out.data_ptr(), scratch.ctypes.data,
        scratch.strides[0], bits(scale)))]))
    return out.to(q_NHK.dtype)


class Metadata:
    """Attention metadata of a step, int64 at `address`: the addresses of the arrays that `paged`
    takes, the width of a table, the number of sequences, and the addresses of each new token's
    block and offset there (int64), for `operations.rotate`."""

    def __init__(self, query_start: np.ndarray, lengths: np.ndarray, tables: np.ndarray,
                 first_block: np.ndarray, *new: np.ndarray) -> None:
        starts, lengths, first = (np.ascontiguousarray(x, np.int64)
                                  for x in (query_start, lengths, first_block))
        tables = np.ascontiguousarray(tables, np.int32)
        arrays = starts, lengths, tables, first
        self.operands = np.array([*(x.ctypes.data for x in arrays), tables.shape[1], len(lengths),
                                  *(x.ctypes.data for x in new)], np.int64)
        self._kept = *arrays, new
        self.address = int(self.operands.ctypes.data)


def scratch_of(K: int) -> np.ndarray:
    """Memory for the threads of `attend`, uint8 [threads, bytes]."""
    return np.empty((torch.get_num_threads(), 4 * ROWS * (K + SEGMENT + ROW // 4)), np.uint8)


def bits(number: float) -> int:
    """A float32 number as an operand."""
    return int(np.float32(number).view(np.int32))


def takes(keys: Tensor | None, values: Tensor) -> bool:
    """Whether `paged` attends over these pages."""
    wide = values.shape[3] % (WIDTH * L) == 0 and (keys is None or keys.shape[2] % BLOCK == 0)
    return values.dtype in DTYPES and values.device.type == "cpu" and wide


@cache
def attend(dtype: int, shared: bool) -> Operation:
    """Operands: queries, bytes of a token's, keys, values, the address of a `Metadata`, sizes,
    window, chunk, out, scratch of each thread and its size, scale's bits."""
    is_shared = int(shared)

    @Operation
    def run(operands: int, thread: int, threads: int) -> None:
        (q, q_row, keys, values, metadata, H, G, K, U, window, chunk, out, scratch, scratch_size,
         scale_bits) = v.unpack(operands, 15)
        starts, lengths, tables, firsts, table_row, R = v.unpack(metadata, 6)
        scale = v.as_float(scale_bits)
        heads = H // G
        scratch += thread * scratch_size
        unit = 0
        for r in range(R):
            begin, end = v.read_i64(starts + 8 * r), v.read_i64(starts + 8 * r + 8)
            before = v.read_i64(lengths + 8 * r) - (end - begin)  # position of its first query
            first = v.read_i64(firsts + 8 * r)
            table = tables + 4 * (r * table_row - first)
            rows = (end - begin) * heads
            for g in range(G):
                for i in range(0, rows, ROWS):
                    if unit % threads == thread:
                        there = (q + begin * q_row + g * heads * K * 4, q_row, heads, H, i, rows,
                                 before, window, chunk)
                        result = out + (begin * H + g * heads) * U * 4
                        tile(dtype, is_shared, there, keys, values, table, g, G, K, U, scale,
                             result, scratch)
                    unit += 1

    return run


@template
def load(dtype: int) -> Any:
    """(address) -> L numbers of a page as float32."""
    return [lambda at: v.load_f32(at), lambda at: v.load_bf16(at), lambda at: v.load_f16(at)][dtype]


# What a tile knows of each row, in ROW bytes: its first and last key, the maximum of its scores and
# the sum of their exponentials up to here, and what the values up to here and those of the segment
# are multiplied by.
START, LAST, MAXIMUM, SUM, OLD, NEW, ROW = 0, 8, 16, 20, 24, 28, 32


@template
def tile(dtype: int, shared: int) -> Any:
    """The rows of a tile, of one key head. `there` says which: the address of queries, bytes of a
    token's, heads that share the keys, all heads, the first row, their number, position of the
    first query, window and chunk."""
    size, T = 4 if dtype == 0 else 2, ROWS

    @procedure
    def run(there: tuple[int, ...], keys: int, values: int, table: int, g: int, G: int, K: int,
            U: int, scale: float, out: int, scratch: int) -> None:
        not_inlined()
        q, q_row, heads, H, i, rows, before, window, chunk = there
        scores = scratch + T * K * 4
        state = scores + T * SEGMENT * 4
        low, high = 1 << 62, 0
        for t in range(T):
            row = min(i + t, rows - 1)  # those beyond the last repeat it
            token, head = row // heads, row % heads
            last = before + token
            start = max(0, last - window + 1) if window else 0
            if chunk:
                start = max(start, last // chunk * chunk)
            v.write_i64(state + t * ROW + START, start)
            v.write_i64(state + t * ROW + LAST, last)
            v.write_f32(state + t * ROW + MAXIMUM, NOTHING)
            v.write_f32(state + t * ROW + SUM, f32(0))
            low, high = min(low, start), max(high, last)
            for k in range(K):  # [K][T]; where values are keys, [T][K]
                at = scratch + (t * K + k if shared else k * T + t) * 4
                v.write_f32(at, v.read_f32(q + token * q_row + (head * K + k) * 4) * scale)
            for u in range(0, U, L):
                v.store_f32(out + ((token * H + head) * U + u) * 4, v.splat(f32(0)))
        for origin in range(low // SEGMENT * SEGMENT, high + 1, SEGMENT):
            start, end = max(origin, low), min(origin + SEGMENT, high + 1)
            for b in range(start // BLOCK, (end - 1) // BLOCK + 1):
                page = (v.read_i32(table + 4 * b) * G + g) * BLOCK * size
                at = scores + (b * BLOCK - origin) * 4
                if shared:
                    shared_scores(dtype, values + page * U, K, scratch, at)
                else:
                    for p in range(0, BLOCK, L):
                        key_scores(dtype, keys + page * K + p * size, K, scratch, at + 4 * p)
            for t in range(T):
                _softmax(scores + t * SEGMENT * 4, state + t * ROW, origin, start, end)
            for u in range(0, U, WIDTH * L):
                add_values(dtype, there, values, table, g, G, U, u, scores, state, origin, start,
                           end, out)
        for t in range(min(T, rows - i)):
            token, head = (i + t) // heads, (i + t) % heads
            inverse = v.splat(f32(1) / v.read_f32(state + t * ROW + SUM))
            for u in range(0, U, L):
                at = out + ((token * H + head) * U + u) * 4
                v.store_f32(at, v.load_f32(at) * inverse)

    return run


@template
def key_scores(dtype: int) -> Any:
    """(page, K, q, scores): scores of a tile's rows with L keys of a page, sums over even and over
    odd features."""
    size, T, count = 4 if dtype == 0 else 2, ROWS, 2 * ROWS

    def run(page: int, K: int, q: int, scores: int) -> None:
        total = v.floats(count)
        for k in range(0, K, 2):
            for odd in range(2):
                key = load(dtype, page + (k + odd) * BLOCK * size)
                for t in range(T):
                    feature = v.splat(v.read_f32(q + ((k + odd) * T + t) * 4))
                    total[odd * T + t] = v.fma(key, feature, total[odd * T + t])
        for t in range(T):
            v.store_f32(scores + t * SEGMENT * 4, total[t] + total[T + t])

    return run


@template
def shared_scores(dtype: int) -> Any:
    """(page, K, q, scores): scores of a tile's rows with the 16 keys of a page of values."""
    size, T = 4 if dtype == 0 else 2, ROWS

    def run(page: int, K: int, q: int, scores: int) -> None:
        for i in range(BLOCK):
            total = v.floats(T)
            for k in range(0, K, L):
                key = load(dtype, page + (i * K + k) * size)
                for t in range(T):
                    total[t] = v.fma(key, v.load_f32(q + (t * K + k) * 4), total[t])
            for t in range(T):
                v.write_f32(scores + (t * SEGMENT + i) * 4, v.sum_of(total[t]))

    return run


@kernel
def _softmax(scores: int, state: int, origin: int, start: int, end: int) -> None:
    """Scores of one row with the keys of a segment become exponentials, 0 where it does not see
    the key; its state takes them in."""
    first, last = v.read_i64(state + START), v.read_i64(state + LAST)
    begin = start // BLOCK * BLOCK
    stop = (end - 1) // BLOCK * BLOCK + BLOCK
    for key in range(begin, min(first, stop)):
        v.write_f32(scores + (key - origin) * 4, NOTHING)
    for key in range(max(last + 1, begin), stop):
        v.write_f32(scores + (key - origin) * 4, NOTHING)
    largest = v.splat(NOTHING)
    for key in range(begin, stop, L):
        largest = v.maximum(largest, v.load_f32(scores + (key - origin) * 4))
    most, before = v.maximum_of(largest), v.read_f32(state + MAXIMUM)
    if most == NOTHING:
        for key in range(begin, stop, L):
            v.store_f32(scores + (key - origin) * 4, v.splat(f32(0)))
        v.write_f32(state + OLD, f32(1))
        v.write_f32(state + NEW, f32(0))
        return
    total = v.splat(f32(0))
    for key in range(begin, stop, L):
        share = v.exp(v.load_f32(scores + (key - origin) * 4) - v.splat(most))
        v.store_f32(scores + (key - origin) * 4, share)
        total = total + share
    now = max(before, most) if most == most else most  # not a number stays so
    old, new = v.first_of(v.exp(v.splat(before - now))), v.first_of(v.exp(v.splat(most - now)))
    v.write_f32(state + OLD, old)
    v.write_f32(state + NEW, new)
    v.write_f32(state + MAXIMUM, now)
    v.write_f32(state + SUM, v.read_f32(state + SUM) * old + v.sum_of(total) * new)


@template
def add_values(dtype: int) -> Any:
    """(there, values, table, g, G, U, u, scores, state, origin, start, end, out): a few vectors of
    each row of the result, from feature u on, take in the keys from start to end."""
    size, T, V, count = 4 if dtype == 0 else 2, ROWS, WIDTH, ROWS * WIDTH

    def run(there: tuple[int, ...], values: int, table: int, g: int, G: int, U: int, u: int,
            scores: int, state: int, origin: int, start: int, end: int, out: int) -> None:
        _, _, heads, H, i, rows, _, _, _ = there
        total, value = v.floats(count), v.floats(V)
        for b in range(start // BLOCK, (end - 1) // BLOCK + 1):
            page = values + ((v.read_i32(table + 4 * b) * G + g) * BLOCK * U + u) * size
            for key in range(max(start, b * BLOCK), min(end, (b + 1) * BLOCK)):
                for n in range(V):
                    value[n] = load(dtype, page + ((key - b * BLOCK) * U + n * L) * size)
                for t in range(T):
                    share = v.splat(v.read_f32(scores + (t * SEGMENT + key - origin) * 4))
                    for n in range(V):
                        total[t * V + n] = v.fma(share, value[n], total[t * V + n])
        for t in range(T):
            if i + t < rows:
                token, head = (i + t) // heads, (i + t) % heads
                old = v.splat(v.read_f32(state + t * ROW + OLD))
                new = v.splat(v.read_f32(state + t * ROW + NEW))
                for n in range(V):
                    at = out + ((token * H + head) * U + u + n * L) * 4
                    v.store_f32(at, v.fma(total[t * V + n], new, v.load_f32(at) * old))

    return run
