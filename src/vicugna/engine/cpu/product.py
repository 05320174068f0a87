"""Products of activations with packed weights: the operations `quantise` and `product`.

A tile is the product of a few tokens with 16 rows of weights, or a few times 16, whose sums stay in
registers. Every number of the result is one sum in the order of the columns, made by the same
instructions in every tile: its bits do not depend on the other tokens.

For weights of blocks, activations become int8 too, as in llama.cpp: with a scale for the columns of
each block of the weights, 32 or 256, which is float16 for those of 32. Sums over a group of 32
columns are then exact integers. The rows of a tile's T tokens are laid out together, in the order
in which the tile reads them:

    [group][T][32] int8     [group][T] scales, float32     [group][T] sides

A side is what offset or minima of the weights contribute: the group's sum of activations times
-offset (int32, for each 16 columns where scales are for 16), or times minus its scale (float32).
"""

from functools import cache
from typing import Any

import numpy as np

from vicugna.engine.cpu import vectors as v
from vicugna.engine.cpu.compiler import Operation, kernel, not_inlined, procedure, template
from vicugna.engine.cpu.formats import BY_NUMBER, ROWS, Format

L = v.L
PARTS = ROWS // L  # vectors that hold a number for each of 16 rows
SUMS = v.SET.registers // 2  # registers for sums; the others hold weights and scales
MOST_TOKENS = 8 if L == 16 else 4  # of a tile; others have 4 and 1
FLOAT_ROWS = 4  # most blocks of 16 rows of a tile of floats
CHUNK = 1 << 19  # bytes of activations that stay in the cache while all weights pass

f32 = np.float32


@kernel
def share(count: int, thread: int, threads: int) -> tuple[int, int]:
    """The part of `count` things that a thread does: contiguous, as memory is read best."""
    return count * thread // threads, count * (thread + 1) // threads


@kernel
def part(M: int, count: int, thread: int, threads: int) -> tuple[int, int, int, int]:
    """Of M tokens with `count` groups of 32 columns each, the tokens and the groups that a thread
    does, first and end: a share of the tokens, or where these are few a share of the groups, by
    eights where that is possible (the scale of 256 columns needs all of them)."""
    if threads <= M:
        first, end = share(M, thread, threads)
        return first, end, 0, count
    unit = 1 if count % 8 else 8
    first, end = share(count // unit, thread, threads)
    return 0, M, first * unit, end * unit


@kernel
def tile_tokens(left: int) -> int:
    """How many of `left` tokens the next tile takes."""
    return MOST_TOKENS if left >= MOST_TOKENS else 4 if left >= 4 else 1


def row_bytes(number: int, columns: int) -> int:
    """Of the activations of one token, as weights of a format need them."""
    form = BY_NUMBER[number]
    if form.is_float:
        return 4 * columns
    return columns + 4 * (columns // 32 + columns // form.group)


# ---- activations to int8

@cache
def quantise(number: int) -> Operation:
    """Operands: x, tokens, columns, out. Activations x, float32 [tokens, columns], as weights of
    this format need them."""
    form = BY_NUMBER[number]
    offset, minima, halves = form.offset, form.minima, 32 // form.group
    block = form.columns // 32

    @Operation
    def run(operands: int, thread: int, threads: int) -> None:
        x, M, K, out = v.unpack(operands, 4)
        size = K + 4 * (K // 32) * (1 + halves)
        first, end, group, last = part(M, K // 32, thread, threads)
        start = 0
        while start < end:
            T = tile_tokens(M - start)
            for t in range(max(first - start, 0), min(end - start, T)):
                _quantise_row(x + (start + t) * K * 4, K // 32, group, last, out + start * size, T,
                              t, offset, minima, halves, block)
            start += T

    return run


@kernel
def _quantise_row(x: int, groups: int, first: int, last: int, out: int, T: int, t: int, offset: int,
                  minima: bool, halves: int, block: int) -> None:
    scales = out + T * groups * 32
    sides = scales + T * groups * 4
    most = f32(0)
    for g in range(first, last):
        if g % block == 0:
            largest = v.splat_i32(0)
            for i in range(g * 32, (g + block) * 32, L):
                largest = v.larger(largest, v.magnitude_bits(v.load_f32(x + i * 4)))
            most = v.as_float(v.largest_of(largest))
        # Not a number stays so in the scale, and a whole group of nearly nothing is nothing.
        inverse = v.splat(f32(127) / most if most > f32(1e-30) else f32(0))
        place = g * T + t
        first, second = v.splat_i32(0), v.splat_i32(0)
        for i in range(0, 16, L):
            first += v.store_s8(out + place * 32 + i, v.load_f32(x + (g * 32 + i) * 4) * inverse)
        for i in range(16, 32, L):
            second += v.store_s8(out + place * 32 + i, v.load_f32(x + (g * 32 + i) * 4) * inverse)
        scale = most / f32(127)
        v.write_f32(scales + place * 4, v.round_f16(scale) if block == 1 else scale)
        if halves == 2:
            v.write_i32(sides + place * 8, -offset * v.sum_of_ints(first))
            v.write_i32(sides + place * 8 + 4, -offset * v.sum_of_ints(second))
        elif minima:
            v.write_f32(sides + place * 4, -scale * f32(v.sum_of_ints(first + second)))
        else:
            v.write_i32(sides + place * 4, -offset * v.sum_of_ints(first + second))


# ---- codes and scales of weights

@template
def codes_of(bits: int) -> Any:
    """(codes, j) -> codes of columns 4j to 4j + 3 of a group of 32 columns (formats.py)."""
    def four(codes: int, j: int) -> Any:
        pair = v.load_bytes(codes + 64 * (j & 3))
        return pair & v.splat_byte(15) if j < 4 else v.shift_right(pair, 4)

    def five(codes: int, j: int) -> Any:
        high = v.shift_right(v.load_bytes(codes + 256), j) & v.splat_byte(1)
        return codes_of(4, codes, j) | v.shift_left(high, 4)

    def six(codes: int, j: int) -> Any:
        both = v.load_bytes(codes + 256 + 64 * (j >> 2))
        high = v.shift_right(both, 2 * (j & 3)) & v.splat_byte(3)
        return codes_of(4, codes, j) | v.shift_left(high, 4)

    def eight(codes: int, j: int) -> Any:
        return v.load_bytes(codes + 64 * j)

    return {4: four, 5: five, 6: six, 8: eight}[bits]


@template
def scale_of(number: int) -> Any:
    """(scales, g, half, row) -> scales of group g, or half of it, of rows from number `row` on."""
    form = BY_NUMBER[number]
    size = form.scale_bytes

    def simple(scales: int, g: int, half: int, row: int) -> Any:
        return v.load_f16(scales + g * size + 2 * row)

    def unsigned(scales: int, g: int, half: int, row: int) -> Any:
        block = scales + (g >> 3) * size
        return v.load_f16(block + 2 * row) * v.load_u8(block + 64 + (g & 7) * 16 + row)

    def signed(scales: int, g: int, half: int, row: int) -> Any:
        block = scales + (g >> 3) * size
        return v.load_f16(block + 2 * row) * v.load_s8(block + 32 + ((g & 7) * 2 + half) * 16 + row)

    return simple if form.columns == 32 else unsigned if form.minima else signed


@template
def minimum_of(number: int) -> Any:
    """(scales, g, row) -> minima of group g of rows from number `row` on."""
    form = BY_NUMBER[number]
    size = form.scale_bytes

    def simple(scales: int, g: int, row: int) -> Any:
        return v.load_f16(scales + g * size + 32 + 2 * row)

    def unsigned(scales: int, g: int, row: int) -> Any:
        block = scales + (g >> 3) * size
        return v.load_f16(block + 32 + 2 * row) * v.load_u8(block + 192 + (g & 7) * 16 + row)

    return simple if form.columns == 32 else unsigned


# ---- tiles

@template
def tile(number: int, T: int, R: int) -> Any:
    """(x, row, K, codes, scales, y, y_row, bias): T tokens, `row` bytes apart, times R * 16 rows of
    K weights to y, whose rows are `y_row` bytes apart; plus a bias unless its address is 0."""
    form = BY_NUMBER[number]
    return _float_tile(form, T, R) if form.is_float else _integer_tile(form, T)


def _float_tile(form: Format, T: int, R: int) -> Any:
    """Each token's number at a column times that column of all rows."""
    size, load = form.bits // 8, v.load_f32 if form.bits == 32 else v.load_bf16
    V = R * PARTS  # vectors that hold a number for each row
    sums = T * V

    def run(x: int, row: int, K: int, codes: int, scales: int, y: int, y_row: int,
            bias: int) -> None:
        total, weight = v.floats(sums), v.floats(V)
        for k in range(K):
            for i in range(V):
                weight[i] = load(codes + (i // PARTS * K + k) * ROWS * size + i % PARTS * L * size)
            for t in range(T):
                factor = v.splat(v.read_f32(x + t * row + k * 4))
                for i in range(V):
                    total[t * V + i] = v.fma(factor, weight[i], total[t * V + i])
        for t in range(T):
            for i in range(V):
                _put(y + t * y_row + i * L * 4, total[t * V + i], bias, i * L * 4)

    return run


def _integer_tile(form: Format, T: int) -> Any:
    """Exact sums of products of integers for each group, scaled and added up in float32."""
    number, bits, minima = form.number, form.bits, form.minima
    dot = v.dot4 if bits == 8 else v.dot4_small
    halves = 32 // form.group
    steps, count = 8 // halves, T * PARTS

    @kernel
    def add_group(total: Any, sums: Any, p: int, x: int, x_scales: int, sides: int, codes: int,
                  scales: int, g: int) -> None:
        """Group g of columns, of the p-th part of the rows."""
        for half in range(halves):
            for t in range(T):
                sums[t] = v.splat_i32(0 if minima else v.read_i32(sides + 4 * (t * halves + half)))
            for i in range(half * steps, (half + 1) * steps):
                code = codes_of(bits, codes, i)
                for t in range(T):
                    sums[t] = dot(sums[t], code, v.four_bytes(x + 32 * t + 4 * i))
            scale = scale_of(number, scales, g, half, p * L)
            for t in range(T):
                scaled = scale * v.splat(v.read_f32(x_scales + 4 * t))
                total[t * PARTS + p] = v.fma(v.to_floats(sums[t]), scaled, total[t * PARTS + p])
        if minima:
            minimum = minimum_of(number, scales, g, p * L)
            for t in range(T):
                side = v.splat(v.read_f32(sides + 4 * t))
                total[t * PARTS + p] = v.fma(minimum, side, total[t * PARTS + p])

    def run(x: int, row: int, K: int, codes: int, scales: int, y: int, y_row: int,
            bias: int) -> None:
        total, sums = v.floats(count), v.ints(T)
        x_scales = x + T * K
        sides = x_scales + T * (K // 32) * 4
        for g in range(K // 32):
            for p in range(PARTS):
                add_group(total, sums, p, x + g * T * 32, x_scales + g * T * 4,
                          sides + g * T * 4 * halves, codes + g * bits * 64 + p * L * 4, scales, g)
        for t in range(T):
            for p in range(PARTS):
                _put(y + t * y_row + p * L * 4, total[t * PARTS + p], bias, p * L * 4)

    return run


@kernel
def _put(y: int, values: Any, bias: int, offset: int) -> None:
    if bias != 0:
        values = values + v.load_f32(bias + offset)
    v.store_f32(y, values)


# ---- the whole product

@template
def strip(number: int, T: int) -> Any:
    """(x, row, K, codes, scales, blocks, y, y_row, bias): T tokens times some blocks of 16 rows, as
    `tile`."""
    form = BY_NUMBER[number]
    code_size, scale_size, columns = 2 * form.bits, form.scale_bytes, form.columns
    # Where sums are few, more rows of float weights at once: additions wait for each other.
    R = max(1, min(FLOAT_ROWS, SUMS // (T * PARTS))) if form.is_float else 1

    @procedure
    def run(x: int, row: int, K: int, codes: int, scales: int, blocks: int, y: int, y_row: int,
            bias: int) -> None:
        not_inlined()
        b = 0
        while b < blocks:
            w, s = codes + b * code_size * K, scales + b * scale_size * (K // columns)
            add = bias + b * 64 if bias else 0
            if b + R <= blocks:
                tile(number, T, R, x, row, K, w, s, y + b * 64, y_row, add)
                b += R
            else:
                tile(number, T, 1, x, row, K, w, s, y + b * 64, y_row, add)
                b += 1

    return run


@cache
def product(number: int) -> Operation:
    """Operands: x as `quantise` made it (floats: [tokens, columns]), tokens, columns, codes,
    scales, number of blocks of 16 rows, y, bytes of a row of y, bias. y is float32 [tokens, rows].
    """
    form = BY_NUMBER[number]
    is_float, code_size, scale_size = form.is_float, 2 * form.bits, form.scale_bytes
    columns, sides = form.columns, 0 if form.is_float else 32 // form.group
    at_once = FLOAT_ROWS if is_float else 1

    @Operation
    def run(operands: int, thread: int, threads: int) -> None:
        x, M, K, codes, scales, blocks, y, y_row, bias = v.unpack(operands, 9)
        row = 4 * K if is_float else K + 4 * (K // 32) * (1 + sides)
        chunk = max(MOST_TOKENS, CHUNK // row // MOST_TOKENS * MOST_TOKENS)
        first, last = share(blocks, thread, threads)
        for begin in range(0, M, chunk):
            end = min(begin + chunk, M)
            for b in range(first, last, at_once):
                w, s = codes + b * code_size * K, scales + b * scale_size * (K // columns)
                n, add = min(at_once, last - b), bias + b * 64 if bias else 0
                m = begin
                while m < end:
                    a, out = x + m * row, y + m * y_row + b * 64
                    T = tile_tokens(end - m)
                    if T == 8:
                        strip(number, 8, a, row, K, w, s, n, out, y_row, add)
                    elif T == 4:
                        strip(number, 4, a, row, K, w, s, n, out, y_row, add)
                    else:
                        strip(number, 1, a, row, K, w, s, n, out, y_row, add)
                    m += T

    return run
