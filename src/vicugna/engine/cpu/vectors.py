"""Vector instructions for kernels: numba types of one register each, and functions over them.

`FLOATS` holds `L` float32 numbers, `INTS` as many int32, `BYTES` four times as many int8; `L` is
that of the instruction set. Memory is addressed by int64. Operators +, -, *, / and & work on
vectors; `floats(n)` and `ints(n)` are n registers, which loops of constant length index.
The LLVM code of each is one or a few instructions, the same on every instruction set but for
`dot4`; nothing is reordered, so results are the same bits wherever a function is inlined.
"""

import inspect
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, models, register_model

from vicugna.engine.cpu import instruction_set

SET = instruction_set.chosen()
L = SET.lanes

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
VOID = ir.VoidType()
ADDRESS = types.intp


class Vector(types.Type):
    """A vector register of `length` numbers."""

    def __init__(self, name: str, element: ir.Type, length: int) -> None:
        self.llvm, self.length = ir.VectorType(element, length), length
        super().__init__(name=f"{name}x{length}")


class Registers(types.Type):
    """A fixed number of vector registers."""

    def __init__(self, vector: Vector, count: int) -> None:
        self.vector, self.count = vector, count
        super().__init__(name=f"{count} of {vector.name}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


@register_model(Registers)
class _RegistersModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Registers) -> None:
        super().__init__(manager, kind, kind.vector.llvm.as_pointer())


FLOATS, INTS, BYTES = Vector("f32", F32, L), Vector("i32", I32, L), Vector("i8", I8, 4 * L)


# ---- how instructions are declared

def instruction(result: types.Type, *arguments: types.Type) -> Callable[..., Any]:
    """Decorator: a function of these types for kernels. What is decorated gets an LLVM builder and
    the LLVM values of its arguments, and returns that of its result."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def define(typing_context: Any, *given: types.Type) -> tuple[Any, Callable[..., Any]]:
            def generate(context: Any, builder: Any, _: Any, values: Any) -> Any:
                made = emit(builder, *values)
                return context.get_dummy_value() if made is None else made
            return signature(result, *arguments), generate

        define.__name__, define.__doc__ = emit.__name__, emit.__doc__
        define.__signature__ = inspect.signature(emit)  # type: ignore[attr-defined]
        return intrinsic(define)

    return decorate


def _call(b: Any, name: str, result: ir.Type, *values: Any) -> Any:
    """Call an LLVM intrinsic, or a function of the C library."""
    kind = ir.FunctionType(result, [value.type for value in values])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), values)


def _pointer(b: Any, address: Any, kind: ir.Type) -> Any:
    return b.inttoptr(address, kind.as_pointer())


def _read(b: Any, address: Any, kind: ir.Type, align: int = 1) -> Any:
    return b.load(_pointer(b, address, kind), align=align)


def _write(b: Any, address: Any, value: Any, align: int = 1) -> None:
    b.store(value, _pointer(b, address, value.type), align=align)


def _splat(b: Any, value: Any, length: int) -> Any:
    """A vector that repeats a number."""
    kind = ir.VectorType(value.type, length)
    one = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined),
                            ir.Constant(ir.VectorType(I32, length), [0] * length))


def _constant(kind: ir.VectorType, value: float) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _of(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, L)


# ---- registers

def _registers(vector: Vector) -> Any:
    @intrinsic(prefer_literal=True)
    def registers(typing_context: Any, count: Any) -> Any:
        """`count` registers, a constant, all zeros."""
        if not isinstance(count, types.IntegerLiteral):
            return None

        def generate(context: Any, b: Any, _: Any, values: Any) -> Any:
            with b.goto_entry_block():
                first = b.alloca(vector.llvm, size=ir.Constant(I64, count.literal_value))
            for i in range(count.literal_value):
                b.store(_constant(vector.llvm, 0), b.gep(first, [ir.Constant(I64, i)]))
            return first

        return signature(Registers(vector, count.literal_value), count), generate

    return registers


floats, ints = _registers(FLOATS), _registers(INTS)


@infer_global(operator.getitem)
class _GetRegister(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        if isinstance(args[0], Registers):
            return signature(args[0].vector, args[0], ADDRESS)
        return None


@infer_global(operator.setitem)
class _SetRegister(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        if isinstance(args[0], Registers):
            return signature(types.none, args[0], ADDRESS, args[0].vector)
        return None


@lower_builtin(operator.getitem, Registers, ADDRESS)
def _get_register(context: Any, b: Any, _: Any, values: Any) -> Any:
    return b.load(b.gep(values[0], [values[1]]))


@lower_builtin(operator.setitem, Registers, ADDRESS, Vector)
def _set_register(context: Any, b: Any, _: Any, values: Any) -> Any:
    b.store(values[2], b.gep(values[0], [values[1]]))
    return context.get_dummy_value()


# ---- operators

def _operator(symbol: Any, emit: dict[Vector, str]) -> None:
    """Define an operator between vectors of the types of `emit`, by LLVM's name for each."""

    @infer_global(symbol)
    class Typed(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if args[0] == args[1] and args[0] in emit:
                return signature(args[0], *args)
            return None

    @lower_builtin(symbol, Vector, Vector)
    def lower(context: Any, b: Any, sig: Any, values: Any) -> Any:
        return getattr(b, emit[sig.args[0]])(*values)


_operator(operator.add, {FLOATS: "fadd", INTS: "add"})
_operator(operator.iadd, {FLOATS: "fadd", INTS: "add"})
_operator(operator.sub, {FLOATS: "fsub", INTS: "sub"})
_operator(operator.mul, {FLOATS: "fmul", INTS: "mul"})
_operator(operator.truediv, {FLOATS: "fdiv"})
_operator(operator.and_, {BYTES: "and_"})
_operator(operator.or_, {BYTES: "or_"})


# ---- memory

@instruction(FLOATS, ADDRESS)
def load_f32(b: Any, address: Any) -> Any:
    """L float32 numbers."""
    return _read(b, address, FLOATS.llvm)


@instruction(FLOATS, ADDRESS)
def load_f16(b: Any, address: Any) -> Any:
    """L float16 numbers."""
    return b.fpext(_read(b, address, _of(F16)), FLOATS.llvm)


@instruction(FLOATS, ADDRESS)
def load_bf16(b: Any, address: Any) -> Any:
    """L bfloat16 numbers: the upper halves of float32 ones."""
    wide = b.zext(_read(b, address, _of(I16)), INTS.llvm)
    return b.bitcast(b.shl(wide, _constant(INTS.llvm, 16)), FLOATS.llvm)


@instruction(FLOATS, ADDRESS)
def load_u8(b: Any, address: Any) -> Any:
    """L numbers from 0 to 255."""
    return b.uitofp(_read(b, address, _of(I8)), FLOATS.llvm)


@instruction(FLOATS, ADDRESS)
def load_s8(b: Any, address: Any) -> Any:
    """L numbers from -128 to 127."""
    return b.sitofp(_read(b, address, _of(I8)), FLOATS.llvm)


@instruction(BYTES, ADDRESS)
def load_bytes(b: Any, address: Any) -> Any:
    """4 L bytes."""
    return _read(b, address, BYTES.llvm)


@instruction(types.void, ADDRESS, FLOATS)
def store_f32(b: Any, address: Any, values: Any) -> None:
    """L float32 numbers."""
    _write(b, address, values)


@instruction(types.void, ADDRESS, FLOATS)
def store_f16(b: Any, address: Any, values: Any) -> None:
    """L float16 numbers, rounded to the nearest."""
    _write(b, address, b.fptrunc(values, _of(F16)))


@instruction(types.void, ADDRESS, FLOATS)
def store_bf16(b: Any, address: Any, values: Any) -> None:
    """L bfloat16 numbers, rounded to the nearest, halves to the even one."""
    bits = b.bitcast(values, INTS.llvm)
    odd = b.and_(b.lshr(bits, _constant(INTS.llvm, 16)), _constant(INTS.llvm, 1))
    rounded = b.lshr(b.add(bits, b.add(odd, _constant(INTS.llvm, 0x7FFF))),
                     _constant(INTS.llvm, 16))
    nan = b.or_(b.lshr(bits, _constant(INTS.llvm, 16)), _constant(INTS.llvm, 0x40))
    kept = b.select(b.fcmp_unordered("uno", values, values), nan, rounded)
    _write(b, address, b.trunc(kept, _of(I16)))


@instruction(INTS, ADDRESS, FLOATS)
def store_s8(b: Any, address: Any, values: Any) -> Any:
    """L bytes, rounded to the nearest, halves to the even one; returns them."""
    nearest = _call(b, f"llvm.rint.v{L}f32", FLOATS.llvm, values)
    whole = _call(b, f"llvm.fptosi.sat.v{L}i32.v{L}f32", INTS.llvm, nearest)
    _write(b, address, b.trunc(whole, _of(I8)))
    return whole


def _scalar(result: types.Type, kind: ir.Type, size: int) -> tuple[Any, Any]:
    @instruction(result, ADDRESS)
    def read(b: Any, address: Any) -> Any:
        """One number."""
        return _read(b, address, kind, size)

    @instruction(types.void, ADDRESS, result)
    def write(b: Any, address: Any, value: Any) -> None:
        """One number."""
        _write(b, address, value, size)

    return read, write


read_f32, write_f32 = _scalar(types.float32, F32, 4)
read_i32, write_i32 = _scalar(types.int32, I32, 4)
read_i64, write_i64 = _scalar(types.int64, I64, 8)
read_u16, write_u16 = _scalar(types.uint16, I16, 2)
read_u8, write_u8 = _scalar(types.uint8, I8, 1)


@instruction(types.float32, ADDRESS)
def read_f16(b: Any, address: Any) -> Any:
    """One float16 number."""
    return b.fpext(_read(b, address, F16, 2), F32)


@instruction(types.float32, ADDRESS)
def read_bf16(b: Any, address: Any) -> Any:
    """One bfloat16 number."""
    return b.bitcast(b.shl(b.zext(_read(b, address, I16, 2), I32), ir.Constant(I32, 16)), F32)


@intrinsic(prefer_literal=True)
def unpack(typing_context: Any, address: Any, count: Any) -> Any:
    """`count` int64 numbers, a constant, as a tuple."""
    def generate(context: Any, b: Any, sig: Any, values: Any) -> Any:
        numbers = [_read(b, b.add(values[0], ir.Constant(I64, 8 * i)), I64, 8)
                   for i in range(count.literal_value)]
        return context.make_tuple(b, sig.return_type, numbers)

    return signature(types.UniTuple(types.int64, count.literal_value), ADDRESS, count), generate


# ---- whole registers

@instruction(FLOATS, types.float32)
def splat(b: Any, value: Any) -> Any:
    """A float32 number, L times."""
    return _splat(b, value, L)


@instruction(INTS, types.int32)
def splat_i32(b: Any, value: Any) -> Any:
    """An int32 number, L times."""
    return _splat(b, value, L)


@instruction(BYTES, ADDRESS)
def four_bytes(b: Any, address: Any) -> Any:
    """The 4 bytes at an address, L times."""
    return b.bitcast(_splat(b, _read(b, address, I32, 4), L), BYTES.llvm)


@instruction(BYTES, types.int8)
def splat_byte(b: Any, value: Any) -> Any:
    """A byte, 4 L times."""
    return _splat(b, value, 4 * L)


@instruction(BYTES, BYTES, types.int64)
def shift_right(b: Any, x: Any, bits: Any) -> Any:
    """Each byte without its lowest `bits` bits."""
    return b.lshr(x, _splat(b, b.trunc(bits, I8), 4 * L))


@instruction(BYTES, BYTES, types.int64)
def shift_left(b: Any, x: Any, bits: Any) -> Any:
    """Each byte times 2 to the power of `bits`, modulo 256."""
    return b.shl(x, _splat(b, b.trunc(bits, I8), 4 * L))


@instruction(FLOATS, INTS)
def to_floats(b: Any, x: Any) -> Any:
    """Rounded to float32."""
    return b.sitofp(x, FLOATS.llvm)


@instruction(FLOATS, FLOATS, FLOATS, FLOATS)
def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once."""
    return _call(b, f"llvm.fma.v{L}f32", FLOATS.llvm, x, y, z)


@instruction(FLOATS, FLOATS)
def magnitude(b: Any, x: Any) -> Any:
    """Absolute values."""
    return _call(b, f"llvm.fabs.v{L}f32", FLOATS.llvm, x)


@instruction(FLOATS, FLOATS, FLOATS)
def maximum(b: Any, x: Any, y: Any) -> Any:
    """The larger of each pair; not a number if one of them is not."""
    return _call(b, f"llvm.maximum.v{L}f32", FLOATS.llvm, x, y)


@instruction(types.float32, FLOATS)
def sum_of(b: Any, x: Any) -> Any:
    """The sum of L numbers, by halves."""
    for half in _halves():
        x = b.fadd(x, b.shuffle_vector(x, ir.Constant(FLOATS.llvm, ir.Undefined), half))
    return b.extract_element(x, ir.Constant(I32, 0))


@instruction(types.float32, FLOATS)
def maximum_of(b: Any, x: Any) -> Any:
    """The largest of L numbers; not a number if one of them is not."""
    return _call(b, f"llvm.vector.reduce.fmaximum.v{L}f32", F32, x)


@instruction(types.int32, INTS)
def sum_of_ints(b: Any, x: Any) -> Any:
    """The sum of L numbers."""
    return _call(b, f"llvm.vector.reduce.add.v{L}i32", I32, x)


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
        return _call(b, f"llvm.x86.avx512.vpdpbusd.{32 * L}", INTS.llvm, sums, codes, x)
    if SET.dot == "sdot":  # as codes - 128, and twice 64
        sums = _sdot(b, sums, b.xor(codes, _constant(BYTES.llvm, -128)), x)
        half = _constant(BYTES.llvm, 64)
        return _sdot(b, _sdot(b, sums, half, x), half, x)
    if SET.dot == "llvm":
        return _quarters(b, sums, b.mul(b.zext(codes, _quads()), b.sext(x, _quads())))
    kind, eight = ir.VectorType(I16, 2 * L), _constant(ir.VectorType(I16, 2 * L), 8)
    codes, x = b.bitcast(codes, kind), b.bitcast(x, kind)
    even = _madd(b, b.lshr(b.shl(codes, eight), eight), b.ashr(b.shl(x, eight), eight))
    return b.add(sums, b.add(even, _madd(b, b.lshr(codes, eight), b.ashr(x, eight))))


@instruction(INTS, INTS, BYTES, BYTES)
def dot4_small(b: Any, sums: Any, codes: Any, x: Any) -> Any:
    """As `dot4`, for codes from 0 to 127: no pair of products leaves 16 bits."""
    if SET.dot == "vnni":
        return _call(b, f"llvm.x86.avx512.vpdpbusd.{32 * L}", INTS.llvm, sums, codes, x)
    if SET.dot == "sdot":
        return _sdot(b, sums, codes, x)
    if SET.dot == "llvm":
        return _quarters(b, sums, b.mul(b.zext(codes, _quads()), b.sext(x, _quads())))
    name = "llvm.x86.avx512.pmaddubs.w.512" if L == 16 else "llvm.x86.avx2.pmadd.ub.sw"
    pairs = _call(b, name, ir.VectorType(I16, 2 * L), codes, x)
    return b.add(sums, _madd(b, pairs, _constant(pairs.type, 1)))


def _madd(b: Any, x: Any, y: Any) -> Any:
    """Sums of pairs of products of int16 numbers."""
    name = "llvm.x86.avx512.pmaddw.d.512" if L == 16 else "llvm.x86.avx2.pmadd.wd"
    return _call(b, name, INTS.llvm, x, y)


def _sdot(b: Any, sums: Any, x: Any, y: Any) -> Any:
    return _call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", INTS.llvm, sums, x, y)


def _quads() -> ir.VectorType:
    return ir.VectorType(I32, 4 * L)


def _quarters(b: Any, sums: Any, products: Any) -> Any:
    """Add neighbouring products by fours."""
    for j in range(4):
        every_fourth = ir.Constant(ir.VectorType(I32, L), [4 * i + j for i in range(L)])
        sums = b.add(sums, b.shuffle_vector(
            products, ir.Constant(products.type, ir.Undefined), every_fourth))
    return sums
