"""Weights into their layout in memory (formats.py) and back: the operations `relay` (from GGUF's
blocks) and `dequantise`. Blocks are read as llama.cpp defines them (ggml-quants.c)."""

from functools import cache
from typing import Any

import numpy as np

from vicugna.engine.cpu import vectors as v
from vicugna.engine.cpu.compiler import Operation, kernel, template
from vicugna.engine.cpu.formats import BY_NUMBER, ROWS
from vicugna.engine.cpu.product import share

f32 = np.float32


# ---- GGUF's blocks

@template
def gguf_code(number: int) -> Any:
    """(block, e) -> the code of weight e of a block."""
    def q4_0(block: int, e: int) -> int:
        return v.read_u8(block + 2 + (e & 15)) >> (4 * (e >> 4)) & 15

    def q4_1(block: int, e: int) -> int:
        return v.read_u8(block + 4 + (e & 15)) >> (4 * (e >> 4)) & 15

    def q8_0(block: int, e: int) -> int:
        return v.read_u8(block + 2 + e) ^ 128  # from signed

    def q4_k(block: int, e: int) -> int:
        return v.read_u8(block + 16 + 32 * (e >> 6) + (e & 31)) >> (4 * (e >> 5 & 1)) & 15

    def q5_k(block: int, e: int) -> int:
        low = v.read_u8(block + 48 + 32 * (e >> 6) + (e & 31)) >> (4 * (e >> 5 & 1)) & 15
        return low | (v.read_u8(block + 16 + (e & 31)) >> (e >> 5) & 1) << 4

    def q6_k(block: int, e: int) -> int:
        half, quarter, i = e >> 7, e >> 5 & 3, e & 31
        low = v.read_u8(block + 64 * half + 32 * (quarter & 1) + i) >> (4 * (quarter >> 1)) & 15
        return low | (v.read_u8(block + 128 + 32 * half + i) >> (2 * quarter) & 3) << 4

    return {"q4_0": q4_0, "q4_1": q4_1, "q8_0": q8_0, "q4_k": q4_k, "q5_k": q5_k,
            "q6_k": q6_k}[BY_NUMBER[number].name]


@template
def relay_scales(number: int) -> Any:
    """(block, scales, row): the scales of a block to those of 16 rows."""
    def only(block: int, scales: int, row: int) -> None:
        v.write_u16(scales + 2 * row, v.read_u16(block))

    def with_minimum(block: int, scales: int, row: int) -> None:
        v.write_u16(scales + 2 * row, v.read_u16(block))
        v.write_u16(scales + 32 + 2 * row, v.read_u16(block + 2) ^ 0x8000)  # it is added there

    def six_bits(block: int, scales: int, row: int) -> None:
        v.write_u16(scales + 2 * row, v.read_u16(block))
        v.write_u16(scales + 32 + 2 * row, v.read_u16(block + 2))
        for i in range(4):
            at = block + 4 + i
            a, b, c = v.read_u8(at), v.read_u8(at + 4), v.read_u8(at + 8)
            v.write_u8(scales + 64 + 16 * i + row, a & 63)
            v.write_u8(scales + 192 + 16 * i + row, b & 63)
            v.write_u8(scales + 64 + 16 * (i + 4) + row, c & 15 | a >> 6 << 4)
            v.write_u8(scales + 192 + 16 * (i + 4) + row, c >> 4 | b >> 6 << 4)

    def eight_bits(block: int, scales: int, row: int) -> None:
        v.write_u16(scales + 2 * row, v.read_u16(block + 208))
        for i in range(16):
            v.write_u8(scales + 32 + 16 * i + row, v.read_u8(block + 192 + i))

    return {"q4_0": only, "q8_0": only, "q4_1": with_minimum, "q4_k": six_bits, "q5_k": six_bits,
            "q6_k": eight_bits}[BY_NUMBER[number].name]


@template
def relay_codes(number: int) -> Any:
    """(block, first, codes, row): 32 codes of a block, from number `first` on."""
    bits = BY_NUMBER[number].bits

    def run(block: int, first: int, codes: int, row: int) -> None:
        at = codes + 4 * row
        if bits == 8:
            for k in range(32):
                v.write_u8(at + 64 * (k >> 2) + (k & 3), gguf_code(number, block, first + k))
            return
        for k in range(16):
            low = gguf_code(number, block, first + k) & 15
            high = gguf_code(number, block, first + k + 16) & 15
            v.write_u8(at + 64 * (k >> 2) + (k & 3), low | high << 4)
        if bits == 5:
            for i in range(4):
                plane = 0
                for j in range(8):
                    plane |= (gguf_code(number, block, first + 4 * j + i) >> 4) << j
                v.write_u8(at + 256 + i, plane)
        if bits == 6:
            for i in range(4):
                for half in range(2):
                    plane = 0
                    for j in range(4):
                        code = gguf_code(number, block, first + 16 * half + 4 * j + i)
                        plane |= (code >> 4) << (2 * j)
                    v.write_u8(at + 256 + 64 * half + i, plane)

    return run


@cache
def relay(number: int) -> Operation:
    """Operands: raw, rows, columns, codes, scales. GGUF's blocks of a matrix to the layout."""
    form = BY_NUMBER[number]
    columns, block_bytes = form.columns, form.block_bytes
    scale_bytes, group_bytes = form.scale_bytes, form.code_bytes(32)

    @Operation
    def run(operands: int, thread: int, threads: int) -> None:
        raw, N, K, codes, scales = v.unpack(operands, 5)
        blocks = K // columns
        first, last = share(-(-N // ROWS), thread, threads)
        for n in range(first * ROWS, min(last * ROWS, N)):
            sixteen, row = n // ROWS, n % ROWS
            for b in range(blocks):
                block = raw + (n * blocks + b) * block_bytes
                relay_scales(number, block, scales + (sixteen * blocks + b) * scale_bytes, row)
                for g in range(columns // 32):
                    group = (sixteen * blocks + b) * (columns // 32) + g
                    relay_codes(number, block, 32 * g, codes + group * group_bytes, row)

    return run


# ---- back to floats

@template
def code_at(bits: int) -> Any:
    """(codes, row, k) -> the code in column k of a group of 32 columns."""
    def four(codes: int, row: int, k: int) -> int:
        pair = v.read_u8(codes + 64 * (k >> 2 & 3) + 4 * row + (k & 3))
        return pair >> (4 * (k >> 4)) & 15

    def five(codes: int, row: int, k: int) -> int:
        high = v.read_u8(codes + 256 + 4 * row + (k & 3)) >> (k >> 2) & 1
        return four_bits(codes, row, k) | high << 4

    def six(codes: int, row: int, k: int) -> int:
        high = v.read_u8(codes + 256 + 64 * (k >> 4) + 4 * row + (k & 3)) >> (2 * (k >> 2 & 3)) & 3
        return four_bits(codes, row, k) | high << 4

    def eight(codes: int, row: int, k: int) -> int:
        return v.read_u8(codes + 64 * (k >> 2) + 4 * row + (k & 3))

    four_bits = kernel(four)
    return {4: four, 5: five, 6: six, 8: eight}[bits]


@template
def weight_at(number: int) -> Any:
    """(codes, scales, row, k) -> the weight in column k of one of 16 rows, float32."""
    form = BY_NUMBER[number]
    bits, offset, group_bytes, size = form.bits, form.offset, form.code_bytes(32), form.scale_bytes

    def float32(codes: int, scales: int, row: int, k: int) -> Any:
        return v.read_f32(codes + (k * ROWS + row) * 4)

    def bfloat16(codes: int, scales: int, row: int, k: int) -> Any:
        return v.read_bf16(codes + (k * ROWS + row) * 2)

    def simple(codes: int, scales: int, row: int, k: int) -> Any:
        code = code_at(bits, codes + (k >> 5) * group_bytes, row, k & 31)
        return v.read_f16(scales + (k >> 5) * size + 2 * row) * f32(code - offset)

    def with_minimum(codes: int, scales: int, row: int, k: int) -> Any:
        code = code_at(bits, codes + (k >> 5) * group_bytes, row, k & 31)
        at = scales + (k >> 5) * size + 2 * row
        return v.read_f16(at) * f32(code) - v.read_f16(at + 32)

    def six_bits(codes: int, scales: int, row: int, k: int) -> Any:
        code = code_at(bits, codes + (k >> 5) * group_bytes, row, k & 31)
        at, group = scales + (k >> 8) * size, (k >> 5 & 7) * 16 + row
        return (v.read_f16(at + 2 * row) * f32(v.read_u8(at + 64 + group)) * f32(code)
                - v.read_f16(at + 32 + 2 * row) * f32(v.read_u8(at + 192 + group)))

    def eight_bits(codes: int, scales: int, row: int, k: int) -> Any:
        code = code_at(bits, codes + (k >> 5) * group_bytes, row, k & 31)
        at = scales + (k >> 8) * size
        scale = (v.read_u8(at + 32 + (k >> 4 & 15) * 16 + row) ^ 128) - 128
        return v.read_f16(at + 2 * row) * f32(scale) * f32(code - offset)

    return {"f32": float32, "bf16": bfloat16, "q4_0": simple, "q8_0": simple,
            "q4_1": with_minimum, "q4_k": six_bits, "q5_k": six_bits, "q6_k": eight_bits}[form.name]


@cache
def dequantise(number: int) -> Operation:
    """Operands: numbers of rows (int64), how many, columns, codes, scales, out. Rows of a matrix as
    float32 [how many, columns]."""
    form = BY_NUMBER[number]
    code_size, scale_size, columns = 2 * form.bits, form.scale_bytes, form.columns

    @Operation
    def run(operands: int, thread: int, threads: int) -> None:
        chosen, count, K, codes, scales, out = v.unpack(operands, 6)
        first, last = share(count, thread, threads)
        for i in range(first, last):
            n = v.read_i64(chosen + 8 * i)
            w = codes + n // ROWS * code_size * K
            s = scales + n // ROWS * scale_size * (K // columns)
            for k in range(K):
                v.write_f32(out + (i * K + k) * 4, weight_at(number, w, s, n % ROWS, k))

    return run
