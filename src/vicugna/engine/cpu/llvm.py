"""Vectors as numba types, and how functions over them are declared by the LLVM code they become.

`FLOATS` holds `L` float32 numbers, `INTS` as many int32, `BYTES` four times as many int8; `L` is
that of the instruction set. The operators +, -, *, /, & and | work on vectors. Memory is addressed
by int64. `floats(n)` and `ints(n)` are n registers, which loops of constant length index.
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


def call(b: Any, name: str, result: ir.Type, *values: Any) -> Any:
    """Call an LLVM intrinsic, or a function of the C library."""
    kind = ir.FunctionType(result, [value.type for value in values])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), values)


def pointer(b: Any, address: Any, kind: ir.Type) -> Any:
    return b.inttoptr(address, kind.as_pointer())


def read(b: Any, address: Any, kind: ir.Type, align: int = 1) -> Any:
    return b.load(pointer(b, address, kind), align=align)


def write(b: Any, address: Any, value: Any, align: int = 1) -> None:
    b.store(value, pointer(b, address, value.type), align=align)


def repeat(b: Any, value: Any, length: int) -> Any:
    """A vector that repeats a number."""
    kind = ir.VectorType(value.type, length)
    one = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined),
                            ir.Constant(ir.VectorType(I32, length), [0] * length))


def constant(kind: ir.VectorType, value: float) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def lanes(element: ir.Type) -> ir.VectorType:
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
                b.store(constant(vector.llvm, 0), b.gep(first, [ir.Constant(I64, i)]))
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
