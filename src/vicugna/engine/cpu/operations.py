"""What a decoder layer does between its products: operations of the fused step (step.py).

Threads share the work of consecutive operations alike (`part`), so that those of equal width need
no barrier between them, nor before `quantise`.
"""

from typing import Any

import numpy as np

from vicugna.engine.cpu import vectors as v
from vicugna.engine.cpu.attention import BLOCK
from vicugna.engine.cpu.compiler import Operation, kernel
from vicugna.engine.cpu.product import part

L = v.L
f32 = np.float32


@kernel
def _sum(x: int, added: int, at: int) -> Any:
    value = v.load_f32(x + at)
    if added:
        value = value + v.load_f32(added + at)
    return value


@Operation
def normalise(operands: int, thread: int, threads: int) -> None:
    """Operands: x, what is added to it or 0, their sum, tokens, D, weight, epsilon's bits, out.
    Root-mean-square norm of the sum [tokens, D], which must not be x: threads read all of x."""
    x, added, total, M, D, weight, eps, out = v.unpack(operands, 8)
    first, end, group, last = part(M, D // 32, thread, threads)
    for row in range(first * D * 4, end * D * 4, D * 4):
        squares = v.splat(f32(0))
        for at in range(row, row + D * 4, L * 4):
            value = _sum(x, added, at)
            squares = v.fma(value, value, squares)
        scale = v.splat(f32(1) / np.sqrt(v.sum_of(squares) / f32(D) + v.as_float(eps)))
        for at in range(group * 128, last * 128, L * 4):
            value = _sum(x, added, row + at)
            v.store_f32(total + row + at, value)
            v.store_f32(out + row + at, value * scale * v.load_f32(weight + at))


@Operation
def rotate(operands: int, thread: int, threads: int) -> None:
    """Operands: q, k and v of each token side by side, bytes of a token's, tokens, their positions
    (int64), H, G, K, cosines and sines [positions, K / 2], pages of keys, pages of values, their
    dtype, the address of an `attention.Metadata`. RoPE of queries and keys in place; keys and
    values go into the pages."""
    (x, row, M, positions, H, G, K, cosines, sines, key_pages, value_pages, dtype,
     metadata) = v.unpack(operands, 13)
    blocks, offsets = v.unpack(metadata + 48, 2)
    size, half = 4 if dtype == 0 else 2, K * 2
    first, end, group, last = part(M, G, thread, threads)
    for t in range(first, end):
        block, offset = v.read_i64(blocks + 8 * t), v.read_i64(offsets + 8 * t)
        at = v.read_i64(positions + 8 * t) * half
        cos, sin = cosines + at, sines + at
        for g in range(group, last):
            for h in range(g * (H // G), (g + 1) * (H // G)):
                _rotate(x + t * row + h * K * 4, half, cos, sin)
            k = x + t * row + (H + g) * K * 4
            _rotate(k, half, cos, sin)
            page = (block * G + g) * BLOCK * K
            for i in range(K):
                _write(key_pages + (page + i * BLOCK + offset) * size, dtype,
                       v.read_f32(k + i * 4))
                _write(value_pages + (page + offset * K + i) * size, dtype,
                       v.read_f32(k + (G * K + i) * 4))


@kernel
def _rotate(x: int, half: int, cosines: int, sines: int) -> None:
    for at in range(0, half, L * 4):
        cos, sin = v.load_f32(cosines + at), v.load_f32(sines + at)
        a, b = v.load_f32(x + at), v.load_f32(x + half + at)
        v.store_f32(x + at, a * cos - b * sin)
        v.store_f32(x + half + at, b * cos + a * sin)


@kernel
def _write(at: int, dtype: int, number: Any) -> None:
    if dtype == 0:
        v.write_f32(at, number)
    elif dtype == 1:
        v.write_bf16(at, number)
    else:
        v.write_f16(at, number)


@Operation
def swiglu(operands: int, thread: int, threads: int) -> None:
    """Operands: gates and ups of each token side by side, tokens, F, out. silu(gate) * up."""
    x, M, F, out = v.unpack(operands, 4)
    one, zero = v.splat(f32(1)), v.splat(f32(0))
    first, end, group, last = part(M, F // 32, thread, threads)
    for t in range(first, end):
        gates, row = x + t * F * 8, out + t * F * 4
        for at in range(group * 128, last * 128, L * 4):
            gate, up = v.load_f32(gates + at), v.load_f32(gates + F * 4 + at)
            v.store_f32(row + at, gate * up / (one + v.exp(zero - gate)))
