"""Compilation of kernels by numba, kept for later processes in the user's cache folder.

A kernel is written as a function of addresses and sizes (int64). An *operation* is a kernel that a
program (threads.py) calls by its address, with its operands, on every thread.
"""

import hashlib
import inspect
import os
import sys
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import types
from numba.core import config
from numba.extending import intrinsic, overload

from vicugna.engine.cpu import instruction_set

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False,
                           "no_cfunc_wrapper": True}

SIGNATURE = types.void(types.int64, types.int64, types.int64)  # operands, thread, threads


def kernel(function: Callable[..., Any]) -> Any:
    """Decorator: a function that other kernels call, compiled into each of them."""
    return numba.njit(forceinline=True, **OPTIONS)(_named(function))


def _named(function: Callable[..., Any]) -> Callable[..., Any]:
    """Name a function after all that it is compiled from. Numba names machine code after the
    function and a number that it counts in each process: of two closures of one factory, cached by
    two processes, the linker could otherwise call one in place of the other."""
    inner = inspect.getclosurevars(function).nonlocals
    parts = [function.__code__.co_code, *(
        getattr(x, "py_func", x).__qualname__ if callable(x) else x
        for x in (*function.__code__.co_consts, *function.__code__.co_names, *inner.values())
        if not inspect.iscode(x))]
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
    function.__qualname__ = f"{function.__qualname__}_{digest}"
    return function


def procedure(function: Callable[..., Any]) -> Any:
    """Decorator: a kernel that is not inlined, for large ones; it calls `not_inlined` itself."""
    return numba.njit(**OPTIONS)(_named(function))


@intrinsic
def not_inlined(typing_context: Any) -> Any:
    """Makes the function that calls it one of its own: LLVM 22, optimising large functions into
    their callers, has lost the start of a sum."""
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate


def template(define: Callable[..., Any]) -> Any:
    """Decorator: of a function of constants that returns a kernel. Kernels call it with both, the
    constants first: `tile(4, 8, x, y)` is `tile(4, 8)(x, y)`, compiled for 4 and 8. What it returns
    is inlined unless it is a `procedure`."""
    count = len(inspect.signature(define).parameters)

    def call(*args: Any) -> Any:
        raise TypeError("a template is called in kernels only, not from Python")

    @overload(call, prefer_literal=True)
    def _typed(*args):  # type: ignore[no-untyped-def]  # numba compares annotations too
        if not all(isinstance(constant, types.IntegerLiteral) for constant in args[:count]):
            return None
        implementation = define(*(constant.literal_value for constant in args[:count]))
        if inspect.isfunction(implementation):
            implementation = kernel(implementation)
        return _named(lambda *args: implementation(*args[count:]))

    return call


class Operation:
    """Decorator: a kernel `(operands, thread, threads)` that every thread of a program calls;
    `operands` is the address of int64 numbers, which `vectors.unpack` reads. Compiled at its first
    use, or read from the cache."""

    def __init__(self, function: Callable[[int, int, int], None]) -> None:
        self._function = _named(function)

    @cached_property
    def address(self) -> int:
        """Of the machine code."""
        return int(self._compiled.address)

    def __call__(self, operands: int, thread: int, threads: int) -> None:
        """Do the part of one thread."""
        self._compiled.ctypes(operands, thread, threads)

    @cached_property
    def _compiled(self) -> Any:
        options = {key: value for key, value in OPTIONS.items()
                   if key not in ("nogil", "no_cfunc_wrapper")}
        return _cached(lambda: numba.cfunc(SIGNATURE, cache=True, **options)(self._function))


def entry(function: Callable[..., Any]) -> Any:
    """Decorator: a kernel that Python calls, without the global interpreter lock."""
    return _cached(lambda: numba.njit(cache=True, **OPTIONS)(_named(function)))


def _cached(compile_: Callable[[], Any]) -> Any:
    """What `compile_` returns, numba's cache being the folder of these kernels."""
    before = config.CACHE_DIR
    config.CACHE_DIR = str(_folder())
    try:
        return compile_()
    finally:
        config.CACHE_DIR = before


@cache
def _folder() -> Path:
    """Compiled kernels of exactly these sources, compilers and instructions. Numba itself adds the
    CPU's name and features to the key of every function."""
    digest = hashlib.sha256(" ".join((sys.version, numba.__version__, llvmlite.__version__,
                                      instruction_set.chosen().name)).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "vicugna" / "kernels" / digest.hexdigest()[:16]
    if not folder.exists() and sys.stderr.isatty():
        print("Compiling CPU kernels; later runs read them from", folder, file=sys.stderr)
    return folder
