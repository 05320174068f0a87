"""The vector instructions of kernels, under one set of names for all instruction sets (llvm.py).

Each becomes one or a few instructions; nothing is reordered, so that results have the same bits
wherever a function is inlined, and on every instruction set.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing import signature
from numba.extending import intrinsic

from vicugna.engine.cpu import llvm
from vicugna.engine.cpu.llvm import (
    ADDRESS,
    BYTES,
    F16,
    F32,
    FLOATS,
    I8,
    I16,
    I32,
    I64,
    INTS,
    SET,
    L,
    instruction,
)

floats, ints = llvm.floats, llvm.ints


# ---- memory

@instruction(FLOATS, ADDRESS)
def load_f32(b: Any, address: Any) -> Any:
    """L float32 numbers."""
    return llvm.read(b, address, FLOATS.llvm)


@instruction(FLOATS, ADDRESS)
def load_f16(b: Any, address: Any) -> Any:
    """L float16 numbers."""
    return b.fpext(llvm.read(b, address, llvm.lanes(F16)), FLOATS.llvm)


@instruction(FLOATS, ADDRESS)
def load_bf16(b: Any, address: Any) -> Any:
    """L bfloat16 numbers: the upper halves of float32 ones."""
    wide = b.zext(llvm.read(b, address, llvm.lanes(I16)), INTS.llvm)
    return b.bitcast(b.shl(wide, llvm.constant(INTS.llvm, 16)), FLOATS.llvm)


@instruction(FLOATS, ADDRESS)
def load_u8(b: Any, address: Any) -> Any:
    """L numbers from 0 to 255."""
    return b.uitofp(llvm.read(b, address, llvm.lanes(I8)), FLOATS.llvm)


@instruction(FLOATS, ADDRESS)
def load_s8(b: Any, address: Any) -> Any:
    """L numbers from -128 to 127."""
    return b.sitofp(llvm.read(b, address, llvm.lanes(I8)), FLOATS.llvm)


@instruction(BYTES, ADDRESS)
def load_bytes(b: Any, address: Any) -> Any:
    """4 L bytes."""
    return llvm.read(b, address, BYTES.llvm)


@instruction(types.void, ADDRESS, FLOATS)
def store_f32(b: Any, address: Any, values: Any) -> None:
    """L float32 numbers."""
    llvm.write(b, address, values)


@instruction(INTS, ADDRESS, FLOATS)
def store_s8(b: Any, address: Any, values: Any) -> Any:
    """L bytes, rounded to the nearest, halves to the even one; returns them. Numbers beyond a byte
    give anything."""
    whole = llvm.call(b, f"llvm.lrint.v{L}i32.v{L}f32", INTS.llvm, values)
    llvm.write(b, address, b.trunc(whole, llvm.lanes(I8)))
    return whole


def _scalar(result: types.Type, kind: ir.Type, size: int) -> tuple[Any, Any]:
    @instruction(result, ADDRESS)
    def read(b: Any, address: Any) -> Any:
        """One number."""
        return llvm.read(b, address, kind, size)

    @instruction(types.void, ADDRESS, result)
    def write(b: Any, address: Any, value: Any) -> None:
        """One number."""
        llvm.write(b, address, value, size)

    return read, write


read_f32, write_f32 = _scalar(types.float32, F32, 4)
read_i32, write_i32 = _scalar(types.int32, I32, 4)
read_i64, write_i64 = _scalar(types.int64, I64, 8)
read_u16, write_u16 = _scalar(types.uint16, I16, 2)
read_u8, write_u8 = _scalar(types.uint8, I8, 1)


@instruction(types.float32, ADDRESS)
def read_f16(b: Any, address: Any) -> Any:
    """One float16 number."""
    return b.fpext(llvm.read(b, address, F16, 2), F32)


@instruction(types.float32, ADDRESS)
def read_bf16(b: Any, address: Any) -> Any:
    """One bfloat16 number."""
    return b.bitcast(b.shl(b.zext(llvm.read(b, address, I16, 2), I32), ir.Constant(I32, 16)), F32)


@instruction(types.float32, types.float32)
def round_f16(b: Any, value: Any) -> Any:
    """The nearest float16 number."""
    return b.fpext(b.fptrunc(value, F16), F32)


@instruction(types.void, ADDRESS, types.float32)
def write_f16(b: Any, address: Any, value: Any) -> None:
    """One number, rounded to float16."""
    llvm.write(b, address, b.fptrunc(value, F16), 2)


@instruction(types.void, ADDRESS, types.float32)
def write_bf16(b: Any, address: Any, value: Any) -> None:
    """One number, rounded to bfloat16, halves to the even one."""
    bits = b.bitcast(value, I32)
    odd = b.and_(b.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
    rounded = b.lshr(b.add(bits, b.add(odd, ir.Constant(I32, 0x7FFF))), ir.Constant(I32, 16))
    nan = b.fcmp_unordered("uno", value, value)
    llvm.write(b, address, b.trunc(b.select(nan, ir.Constant(I32, 0x7FC0), rounded), I16), 2)


@instruction(types.float32, types.int64)
def as_float(b: Any, bits: Any) -> Any:
    """The float32 number of which an operand holds the bits."""
    return b.bitcast(b.trunc(bits, I32), F32)


@intrinsic(prefer_literal=True)
def unpack(typing_context: Any, address: Any, count: Any) -> Any:
    """`count` int64 numbers, a constant, as a tuple."""
    def generate(context: Any, b: Any, sig: Any, values: Any) -> Any:
        numbers = [llvm.read(b, b.add(values[0], ir.Constant(I64, 8 * i)), I64, 8)
                   for i in range(count.literal_value)]
        return context.make_tuple(b, sig.return_type, numbers)

    return signature(types.UniTuple(types.int64, count.literal_value), ADDRESS, count), generate


# ---- whole registers

@instruction(FLOATS, types.float32)
def splat(b: Any, value: Any) -> Any:
    """A float32 number, L times."""
    return llvm.repeat(b, value, L)


@instruction(INTS, types.int32)
def splat_i32(b: Any, value: Any) -> Any:
    """An int32 number, L times."""
    return llvm.repeat(b, value, L)


@instruction(BYTES, ADDRESS)
def four_bytes(b: Any, address: Any) -> Any:
    """The 4 bytes at an address, L times."""
    return b.bitcast(llvm.repeat(b, llvm.read(b, address, I32, 4), L), BYTES.llvm)


@instruction(BYTES, types.int8)
def splat_byte(b: Any, value: Any) -> Any:
    """A byte, 4 L times."""
    return llvm.repeat(b, value, 4 * L)


@instruction(BYTES, BYTES, types.int64)
def shift_right(b: Any, x: Any, bits: Any) -> Any:
    """Each byte without its lowest `bits` bits."""
    return b.lshr(x, llvm.repeat(b, b.trunc(bits, I8), 4 * L))


@instruction(BYTES, BYTES, types.int64)
def shift_left(b: Any, x: Any, bits: Any) -> Any:
    """Each byte times 2 to the power of `bits`, modulo 256."""
    return b.shl(x, llvm.repeat(b, b.trunc(bits, I8), 4 * L))


@instruction(FLOATS, INTS)
def to_floats(b: Any, x: Any) -> Any:
    """Rounded to float32."""
    return b.sitofp(x, FLOATS.llvm)


@instruction(FLOATS, FLOATS, FLOATS, FLOATS)
def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once."""
    return llvm.call(b, f"llvm.fma.v{L}f32", FLOATS.llvm, x, y, z)


@instruction(INTS, FLOATS)
def magnitude_bits(b: Any, x: Any) -> Any:
    """The bits of absolute values: as integers in the same order, and what is not a number above
    all others."""
    return b.and_(b.bitcast(x, INTS.llvm), llvm.constant(INTS.llvm, 0x7FFFFFFF))


@instruction(INTS, INTS, INTS)
def larger(b: Any, x: Any, y: Any) -> Any:
    """The larger of each pair."""
    return llvm.call(b, f"llvm.smax.v{L}i32", INTS.llvm, x, y)


@instruction(types.int32, INTS)
def largest_of(b: Any, x: Any) -> Any:
    """The largest of L numbers."""
    return llvm.call(b, f"llvm.vector.reduce.smax.v{L}i32", I32, x)


@instruction(FLOATS, FLOATS, FLOATS)
def maximum(b: Any, x: Any, y: Any) -> Any:
    """The larger of each pair; not a number if one of them is not."""
    return llvm.call(b, f"llvm.maximum.v{L}f32", FLOATS.llvm, x, y)


@instruction(FLOATS, FLOATS)
def exp(b: Any, x: Any) -> Any:
    """e to the power of x, within 2 units of the last place; 0 below -87, at most e^88.

    2^n times a polynomial of the rest, with the coefficients of Cephes' expf (Moshier, 1992)."""
    def number(value: float) -> Any:
        return llvm.constant(FLOATS.llvm, float(np.float32(value)))

    def fused(p: Any, q: Any, r: Any) -> Any:
        return llvm.call(b, f"llvm.fma.v{L}f32", FLOATS.llvm, p, q, r)

    vanishes = b.fcmp_ordered("<", x, number(-87))
    x = b.select(b.fcmp_ordered(">", x, number(88)), number(88), x)
    x = b.select(vanishes, number(0), x)
    n = llvm.call(b, f"llvm.rint.v{L}f32", FLOATS.llvm, b.fmul(x, number(1.44269504)))
    rest = fused(n, number(2.12194440e-4), fused(n, number(-0.693359375), x))
    sum_ = number(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
                   5.0000001201e-1, 1.0, 1.0):
        sum_ = fused(sum_, rest, number(factor))
    whole = llvm.call(b, f"llvm.lrint.v{L}i32.v{L}f32", INTS.llvm, n)
    exponent = b.add(whole, llvm.constant(INTS.llvm, 127))
    power = b.bitcast(b.shl(exponent, llvm.constant(INTS.llvm, 23)), FLOATS.llvm)
    return b.select(vanishes, number(0), b.fmul(sum_, power))


@instruction(types.float32, FLOATS)
def first_of(b: Any, x: Any) -> Any:
    """The first of L numbers."""
    return b.extract_element(x, ir.Constant(I32, 0))


@instruction(types.float32, FLOATS)
def sum_of(b: Any, x: Any) -> Any:
    """The sum of L numbers, by halves."""
    for half in _halves():
        x = b.fadd(x, b.shuffle_vector(x, ir.Constant(FLOATS.llvm, ir.Undefined), half))
    return b.extract_element(x, ir.Constant(I32, 0))


@instruction(types.float32, FLOATS)
def maximum_of(b: Any, x: Any) -> Any:
    """The largest of L numbers; not a number if one of them is not."""
    return llvm.call(b, f"llvm.vector.reduce.fmaximum.v{L}f32", F32, x)


@instruction(types.int32, INTS)
def sum_of_ints(b: Any, x: Any) -> Any:
    """The sum of L numbers."""
    return llvm.call(b, f"llvm.vector.reduce.add.v{L}i32", I32, x)


def _halves() -> list[Any]:
    """Shuffles that bring the upper half of what is left to the lower."""
    widths = [L >> i for i in range(1, L.bit_length())]
    return [ir.Constant(ir.VectorType(I32, L), [(i + width) % L for i in range(L)])
            for width in widths]


# ---- products of bytes

@instruction(INTS, INTS, BYTES, BYTES)
def dot4(b: Any, sums: Any, codes: Any, x: Any) -> Any:
    """sums[i] + the sum of codes[4i + j] * x[4i + j], j = 0 to 3; codes are 0 to 255, x signed."""
    if SET.dot == "vnni":
        return llvm.call(b, f"llvm.x86.avx512.vpdpbusd.{32 * L}", INTS.llvm, sums, codes, x)
    if SET.dot == "sdot":  # as codes - 128, and twice 64
        sums = _sdot(b, sums, b.xor(codes, llvm.constant(BYTES.llvm, -128)), x)
        half = llvm.constant(BYTES.llvm, 64)
        return _sdot(b, _sdot(b, sums, half, x), half, x)
    if SET.dot == "llvm":
        return _quarters(b, sums, b.mul(b.zext(codes, _quads()), b.sext(x, _quads())))
    kind, eight = ir.VectorType(I16, 2 * L), llvm.constant(ir.VectorType(I16, 2 * L), 8)
    codes, x = b.bitcast(codes, kind), b.bitcast(x, kind)
    even = _madd(b, b.lshr(b.shl(codes, eight), eight), b.ashr(b.shl(x, eight), eight))
    return b.add(sums, b.add(even, _madd(b, b.lshr(codes, eight), b.ashr(x, eight))))


@instruction(INTS, INTS, BYTES, BYTES)
def dot4_small(b: Any, sums: Any, codes: Any, x: Any) -> Any:
    """As `dot4`, for codes from 0 to 127: no pair of products leaves 16 bits."""
    if SET.dot == "vnni":
        return llvm.call(b, f"llvm.x86.avx512.vpdpbusd.{32 * L}", INTS.llvm, sums, codes, x)
    if SET.dot == "sdot":
        return _sdot(b, sums, codes, x)
    if SET.dot == "llvm":
        return _quarters(b, sums, b.mul(b.zext(codes, _quads()), b.sext(x, _quads())))
    name = "llvm.x86.avx512.pmaddubs.w.512" if L == 16 else "llvm.x86.avx2.pmadd.ub.sw"
    pairs = llvm.call(b, name, ir.VectorType(I16, 2 * L), codes, x)
    return b.add(sums, _madd(b, pairs, llvm.constant(pairs.type, 1)))


def _madd(b: Any, x: Any, y: Any) -> Any:
    """Sums of pairs of products of int16 numbers."""
    name = "llvm.x86.avx512.pmaddw.d.512" if L == 16 else "llvm.x86.avx2.pmadd.wd"
    return llvm.call(b, name, INTS.llvm, x, y)


def _sdot(b: Any, sums: Any, x: Any, y: Any) -> Any:
    return llvm.call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", INTS.llvm, sums, x, y)


def _quads() -> ir.VectorType:
    return ir.VectorType(I32, 4 * L)


def _quarters(b: Any, sums: Any, products: Any) -> Any:
    """Add neighbouring products by fours."""
    for j in range(4):
        every_fourth = ir.Constant(ir.VectorType(I32, L), [4 * i + j for i in range(L)])
        sums = b.add(sums, b.shuffle_vector(
            products, ir.Constant(products.type, ir.Undefined), every_fourth))
    return sums
