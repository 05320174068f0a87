"""GGUF files as such: keys, tensors and their types; every length is checked before use.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. `gguf.GGUFReader` does
not check lengths, and takes seconds for a real vocabulary; quantisation is the package's.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vicugna.checkpoint.foreign import check_pointer
from vicugna.checkpoint.stored import broken, short
from vicugna.errors import VicugnaError

MAGIC = b"GGUF"
DropPages = Callable[[Tensor], None]  # called with rows of a tensor that are no longer needed
HEADER_BYTES = 10**8  # twice what the largest vocabularies need
STRINGS = 10**6  # in all lists of a file: the largest vocabularies have 800,000 with their merges
KEYS, TENSORS = 2**12, 2**14
UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", UINT32: "<u4", 5: "<i4", FLOAT32: "<f4",
           BOOL: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
F32, F16, Q4_0, Q8_0, BF16 = 0, 1, 2, 8, 30
REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
           36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}  # types that GGML had once
DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
KIND_OF = {dtype: kind for kind, dtype in DTYPES.items()}
# What can be written, by the names of --dtype; as llama.h's llama_ftype; and types of keys.
KINDS = {"float32": F32, "float16": F16, "bfloat16": BF16, "q8_0": Q8_0, "q4_0": Q4_0}
FILE_TYPES = {F32: 0, F16: 1, Q4_0: 2, Q8_0: 7, BF16: 32}
KEY_TYPES = {bool: BOOL, int: UINT32, float: FLOAT32, str: STRING, list: ARRAY}


def package() -> ModuleType:
    """The package `gguf`; VicugnaError saying how to install it."""
    try:
        import gguf
    except ImportError as error:
        raise VicugnaError("GGUF files need the package gguf", "import gguf",
                           "pip install 'vicugna[gguf]', or: make smollm2") from error
    return gguf


def unrepresentable(what: str, where: str = "config.json") -> VicugnaError:
    """The error for what llama.cpp, and so GGUF, has no place for."""
    return VicugnaError(f"{what} cannot be represented in GGUF", where,
                        "Convert to a Hugging Face folder instead")


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its GGML type, its shape as PyTorch has it, its bytes, mapped, and where
    in the file they begin."""

    kind: int
    shape: tuple[int, ...]
    data: np.ndarray
    begin: int = 0


class _Header:
    """Reads a header forwards, believing no length that goes past the end of the file."""

    def __init__(self, path: Path) -> None:
        self.path, self.at, self.strings = path, 0, 0
        self.file = (np.memmap(path, np.uint8, "c") if path.stat().st_size  # writes stay private
                     else np.zeros(0, np.uint8))
        self.data: memoryview = memoryview(self.file)  # type: ignore[arg-type]

    def take(self, count: int) -> memoryview:
        start = self.at
        if count > min(len(self.data), HEADER_BYTES) - start:
            raise broken(f"truncated, or not GGUF: {count:,} bytes promised at byte {start:,} of "
                         f"{len(self.data):,}", self.path)
        self.at += count
        return self.data[start:self.at]

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return str(self.take(self.number("<Q")), "utf-8")

    def text(self, count: int) -> list[str]:
        """So many strings, of which there may be a million."""
        data, at, length_at, found = self.data, self.at, struct.Struct("<Q").unpack_from, []
        limit = min(len(data), HEADER_BYTES)
        for _ in range(count):
            start = at + 8
            at = start + (length_at(data, at)[0] if start <= limit else 0)
            if at > limit:
                break
            found.append(str(data[start:at], "utf-8"))
        self.take(at - self.at)  # which says what is wrong
        return found

    def count(self, what: str, least_bytes: int, limit: int) -> int:
        """A number of things of at least so many bytes each."""
        count = self.number("<Q")
        if count > min(limit, (len(self.data) - self.at) // least_bytes):
            raise broken(f"{count:,} {what} cannot be in it", self.path)
        return count

    def value(self, kind: int) -> Any:
        """The value of a key: a number, a string, a list of strings or an array of numbers."""
        if kind == STRING:
            return self.string()
        if kind in NUMBERS:
            dtype = np.dtype(NUMBERS[kind])
            return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
        inner = self.number("<I") if kind == ARRAY else kind
        if inner in NUMBERS and kind == ARRAY:
            dtype = np.dtype(NUMBERS[inner])
            count = self.count("values", dtype.itemsize, HEADER_BYTES)
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if inner == STRING:
            count = self.count("strings", 8, STRINGS - self.strings)
            self.strings += count
            return self.text(count)
        raise broken(f"a value of unknown type {inner}", self.path)


def scan(path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The keys and the tensors of a GGUF file, which is mapped, not read.
    VicugnaError for a malformed file; OSError."""
    check_pointer(path)
    header = _Header(path)
    if bytes(header.take(min(4, len(header.data)))) != MAGIC:
        raise broken("not a GGUF file", path)
    if (version := header.number("<I")) not in (2, 3):
        raise VicugnaError(f"GGUF of version {version}, which is not read", str(path),
                           "Convert it again with a current llama.cpp, on a little-endian machine")
    promised = header.count("tensors", 24, TENSORS)
    metadata: dict[str, Any] = {}
    try:
        for _ in range(header.count("keys", 13, KEYS)):
            if (key := header.string()) in metadata:
                raise broken(f"key {short(key)} occurs twice", path)
            metadata[key] = header.value(header.number("<I"))
        listed = sorted(_entry(header) for _ in range(promised))
    except UnicodeDecodeError as error:
        raise broken(f"its header is not UTF-8: {error.reason}", path) from error
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 2**16 or alignment & (alignment - 1):
        raise broken("its alignment is impossible", path)
    if metadata.get("split.count") not in (None, 0, 1):
        raise VicugnaError("one part of a model in several files", str(path),
                           "Join them first: llama-gguf-split --merge FIRST_PART WHOLE")
    start, reached = -(-header.at // alignment) * alignment, 0
    found: dict[str, Entry] = {}
    for offset, length, name, kind, shape in listed:
        where = f"{path} tensor {short(name)}"
        if name in found:
            raise broken("occurs twice", where)
        if offset % alignment or offset < reached:
            raise broken(f"offset {offset:,} is not aligned, or overlaps the one before", where)
        reached = offset + length
        if start + reached > len(header.data):
            raise broken(f"truncated: it ends at byte {start + reached:,} of {len(header.data):,}",
                         where)
        begin = start + offset
        found[name] = Entry(kind, shape, header.file[begin:start + reached], begin)
    return metadata, found


def _entry(header: _Header) -> tuple[int, int, str, int, tuple[int, ...]]:
    """Offset, length, name, type and shape of the next tensor that a header lists."""
    name, dimensions = header.string(), header.number("<I")
    where = f"{header.path} tensor {short(name)}"
    if not 1 <= dimensions <= 4:
        raise broken(f"{dimensions:,} dimensions", where)
    shape = tuple(header.number("<Q") for _ in range(dimensions))[::-1]
    kind, offset = header.number("<I"), header.number("<Q")
    if (block := block_of(kind)) is None:
        raise VicugnaError(f"stored as {type_name(kind)}, which is not read", where,
                           "Convert it with llama.cpp to F32, F16, BF16, Q8_0 or Q4_0")
    if 0 in shape or shape[-1] % block[0]:
        raise broken(f"shape {list(shape)} is not possible for its type", where)
    return offset, math.prod(shape) // block[0] * block[1], name, kind, shape


def type_name(kind: int) -> str:
    """The name that GGML gives the type of this number, such as "Q4_1"."""
    try:
        return package().GGMLQuantizationType(kind).name
    except ValueError:
        return REMOVED.get(kind, f"GGML type {kind}")


@cache
def block_of(kind: int) -> tuple[int, int] | None:
    """Values and bytes in a block of a GGML type; None for one that cannot be read."""
    gguf = package()
    try:
        values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        if kind not in DTYPES:
            gguf.quants.dequantize(np.zeros((1, size), np.uint8), gguf.GGMLQuantizationType(kind))
    except (ValueError, KeyError, NotImplementedError):
        return None
    return values, size


def decode(entry: Entry, expert: int | None = None) -> Tensor:
    """The values of a tensor, or of one expert's part of it: for float types a view of the mapped
    file, else float32."""
    data, shape = np.asarray(entry.data), entry.shape
    if expert is not None:
        data, shape = data.reshape(shape[0], -1)[expert], shape[1:]
    if entry.kind in DTYPES:
        return torch.from_numpy(data).view(DTYPES[entry.kind]).reshape(shape)
    gguf = package()
    values = gguf.quants.dequantize(data.reshape(math.prod(shape[:-1]), -1),
                                    gguf.GGMLQuantizationType(entry.kind))
    return torch.from_numpy(values).reshape(shape)


def encode(tensor: Tensor, kind: int, drop_pages: DropPages) -> np.ndarray:
    """The bytes of a tensor in a GGML type, in rows. Float types take the tensor's values as they
    are: it has that dtype already. Others are made of some rows at a time, as this takes several
    times their memory; `drop_pages` is called with rows that are no longer needed."""
    if kind in DTYPES:
        return tensor.contiguous().view(torch.uint8).numpy()
    gguf = package()
    values, size = gguf.GGML_QUANT_SIZES[kind]
    made = np.empty((*tensor.shape[:-1], tensor.shape[-1] // values * size), np.uint8)
    some = max(1, 2**20 // tensor.shape[-1])
    for n, rows in enumerate(tensor.split(some)):
        made[n * some : (n + 1) * some] = gguf.quants.quantize(
            rows.float().numpy(), gguf.GGMLQuantizationType(kind))
        drop_pages(rows)
    return made
