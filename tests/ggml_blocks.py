"""GGML's blocks of quantised values, made at random and decoded one by one in plain Python.

Written from the description of each format (ggml/src/ggml-common.h): slow, and independent of the
package `gguf` and of the engine's kernels, which are tested against it.
"""

import struct
from collections.abc import Callable

import gguf
import numpy as np

SIZES = {"q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24), "q8_0": (32, 34),
         "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210)}  # values, bytes
# Where in a block its float16 factors are.
FACTORS = {"q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,),
           "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}


def ggml_type(kind: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[kind.upper()]


def random_rows(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """uint8 [rows, bytes]: every bit at random, but factors such that values are of the size of
    weights."""
    values, size = SIZES[kind]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    for at in FACTORS[kind]:
        scale = random.uniform(0.0005, 0.004, blocks.shape[:2]).astype(np.float16)
        if values == 256:
            scale = (scale / 32).astype(np.float16)
        sign = -1 if at == 2 and values == 32 else 1  # a minimum is negative, and as it is in Q4_1
        blocks[..., at : at + 2] = (sign * scale)[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def values_of(kind: str, rows: np.ndarray) -> np.ndarray:
    """float32 [rows, columns]: what rows of blocks stand for."""
    size, decode = SIZES[kind][1], DECODERS[kind]
    return np.array([[value for at in range(0, len(row), size)
                      for value in decode(bytes(row[at : at + size]))] for row in rows],
                    dtype=np.float32)


def half(block: bytes, at: int) -> np.float32:
    return np.float32(struct.unpack_from("<e", block, at)[0])


def nibbles(packed: bytes) -> list[int]:
    """The low halves of all bytes, then the high ones."""
    return [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]


def fifth_bits(packed: bytes) -> list[int]:
    """Of a block of 32: the bits of a little-endian number, lowest first."""
    number = int.from_bytes(packed, "little")
    return [number >> n & 1 for n in range(32)]


def q4_0(block: bytes) -> list[np.float32]:
    d = half(block, 0)
    return [d * np.float32(q - 8) for q in nibbles(block[2:])]


def q4_1(block: bytes) -> list[np.float32]:
    d, m = half(block, 0), half(block, 2)
    return [d * np.float32(q) + m for q in nibbles(block[4:])]


def q5_0(block: bytes) -> list[np.float32]:
    d = half(block, 0)
    return [d * np.float32((q | bit << 4) - 16)
            for q, bit in zip(nibbles(block[6:]), fifth_bits(block[2:6]), strict=True)]


def q5_1(block: bytes) -> list[np.float32]:
    d, m = half(block, 0), half(block, 2)
    return [d * np.float32(q | bit << 4) + m
            for q, bit in zip(nibbles(block[8:]), fifth_bits(block[4:8]), strict=True)]


def q8_0(block: bytes) -> list[np.float32]:
    d = half(block, 0)
    return [d * np.float32(q) for q in struct.unpack_from("<32b", block, 2)]


def six_bits(packed: bytes) -> list[tuple[int, int]]:
    """Scale and minimum of each of the 8 groups of a Q4_K or Q5_K, 6 bits each in 12 bytes."""
    found = [(packed[n] & 63, packed[n + 4] & 63) for n in range(4)]
    return found + [(packed[n + 8] & 15 | packed[n] >> 6 << 4,
                     packed[n + 8] >> 4 | packed[n + 4] >> 6 << 4) for n in range(4)]


def q4_k(block: bytes) -> list[np.float32]:
    return _k(block, nibbles_by_64(block[16:]))


def q5_k(block: bytes) -> list[np.float32]:
    # Bit n of byte i is the highest bit of value i of group n.
    high = [block[16 + i] >> n & 1 for n in range(8) for i in range(32)]
    return _k(block, [q | bit << 4 for q, bit in zip(nibbles_by_64(block[48:]), high,
                                                     strict=True)])


def nibbles_by_64(packed: bytes) -> list[int]:
    """Each 32 bytes hold 32 values in their low halves and the next 32 in the high ones."""
    return [q for at in range(0, 128, 32) for q in nibbles(packed[at : at + 32])]


def _k(block: bytes, quants: list[int]) -> list[np.float32]:
    d, least = half(block, 0), half(block, 2)
    groups = [(d * np.float32(scale), least * np.float32(minimum))
              for scale, minimum in six_bits(block[4:16])]
    return [groups[n // 32][0] * np.float32(q) - groups[n // 32][1] for n, q in enumerate(quants)]


def q6_k(block: bytes) -> list[np.float32]:
    low, high, scales = block[:128], block[128:192], struct.unpack_from("<16b", block, 192)
    d, found = half(block, 208), []
    for part in range(2):  # of 128 values, whose high bits are in 32 bytes, their low in 64
        four = low[64 * part : 64 * part + 64]
        two = high[32 * part : 32 * part + 32]
        bits = [byte >> shift & 3 for shift in (0, 2, 4, 6) for byte in two]
        for n, (q, top) in enumerate(zip(nibbles(four), bits, strict=True)):
            found.append(d * np.float32(scales[8 * part + n // 16])
                         * np.float32((q | top << 4) - 32))
    return found


DECODERS: dict[str, Callable[[bytes], list[np.float32]]] = {
    "q4_0": q4_0, "q4_1": q4_1, "q5_0": q5_0, "q5_1": q5_1, "q8_0": q8_0, "q4_k": q4_k,
    "q5_k": q5_k, "q6_k": q6_k}
