"""A small kernel that shows whether the compiler still gives the instructions their meaning."""

import platform
import sys

import numpy as np

from vicugna.engine.cpu import vectors as v
from vicugna.engine.cpu.compiler import Operation


@Operation
def _probe(operands: int, thread: int, threads: int) -> None:
    codes, small, x, halves, out = v.unpack(operands, 5)
    zero, number = v.splat_i32(0), v.four_bytes(x)
    v.store_f32(out, v.to_floats(v.dot4(zero, v.load_bytes(codes), number)))
    v.store_f32(out + 4 * v.L, v.to_floats(v.dot4_small(zero, v.load_bytes(small), number)))
    v.store_f32(out + 8 * v.L, v.load_f16(halves))


def wrong() -> str:
    """What is wrong with kernels on this machine, or ""."""
    if not (sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")):
        return f"no kernels for {sys.platform} on {platform.machine()}"
    x = np.array([-128, 127, -1, 5], np.int8)
    codes = (255 - np.arange(4 * v.L) % 7).astype(np.uint8)
    halves = np.arange(v.L).astype(np.float16)
    out = np.zeros((3, v.L), np.float32)
    arrays = codes, codes // 2, x, halves, out
    try:
        operands = np.array([array.ctypes.data for array in arrays], np.int64)
        _probe(operands.ctypes.data, 0, 1)
    except Exception as error:
        return f"LLVM does not compile the kernels: {error}"
    products = [some.reshape(v.L, 4).astype(np.int64) @ x for some in arrays[:2]]
    return "" if np.array_equal(out, [*products, halves]) else "the kernels compute wrongly"
