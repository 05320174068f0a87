"""Tensors where they are stored, and how they are read: mapped, not copied.

An FP8 tensor is stored with a float32 factor for each block of it, as DeepSeek V3 publishes its
weights (arXiv 2412.19437, section 3.3).
"""

import ctypes
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vicugna.errors import VicugnaError

FP8 = torch.float8_e4m3fn
# GGML's types whose blocks are read: bytes of a block, and where in it its float16 factors are.
BLOCKS = {"q4_0": (18, (0,)), "q4_1": (20, (0, 2)), "q8_0": (34, (0,)),
          "q4_k": (144, (0, 2)), "q5_k": (176, (0, 2)), "q6_k": (210, (208,))}


@dataclass(frozen=True)
class Blocks:
    """A matrix, or a stack of them, in GGML's blocks of quantised values: the name of their type,
    such as "q4_0", the shape, and the bytes of each row, uint8 [..., rows, bytes]."""

    kind: str
    shape: tuple[int, ...]
    rows: Tensor


@dataclass(frozen=True)
class Quantised:
    """How a file holds a tensor in GGML's blocks: their type's name, the shape (that of the
    products: not transposed), the parts of the file (first byte, and shape in bytes), and what
    makes its rows of theirs."""

    kind: str
    shape: tuple[int, ...]
    parts: tuple[tuple[int, tuple[int, ...]], ...]
    join: Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Stored:
    """Where a tensor is stored, its dtype and its shape, from the header.

    An FP8 tensor's `scale` has one factor for each `block` (rows, columns) of it. Where a file does
    not hold the tensor as it is, `load` makes it; `quantised` says how to read its blocks instead.
    """

    name: str
    file: Path
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    scale: "Stored | None" = None
    block: tuple[int, int] = (1, 1)
    key: str | None = None  # its name in the file, where that is another
    load: Callable[[], Tensor] | None = field(default=None, compare=False)
    quantised: Quantised | None = field(default=None, compare=False)

    def renamed(self, name: str) -> "Stored":
        """The same tensor by another name."""
        return replace(self, name=name, key=self.key or self.name)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def kind(self) -> torch.dtype:
        """The dtype that stands for what is stored: FP8 needs its factors, so it is bfloat16."""
        return torch.bfloat16 if self.dtype == FP8 else self.dtype

    @property
    def where(self) -> str:
        return where(self.file, self.name)


def merged(files: Iterable[Mapping[str, Stored]]) -> dict[str, Stored]:
    """The tensors of several files by name; VicugnaError for a name that occurs in two."""
    found: dict[str, Stored] = {}
    for tensors in files:
        for name in sorted(tensors.keys() & found.keys()):
            raise broken(f"tensor {short(name)} is in {found[name].file.name} too",
                         tensors[name].file)
        found |= tensors
    return found


def where(path: Path, name: str) -> str:
    return f"{path} tensor {short(name)}"


def broken(what: str, where: str | Path) -> VicugnaError:
    """The error for a file that no correct writer makes."""
    return VicugnaError(what, str(where), "Download or write the checkpoint again")


def short(name: str) -> str:
    """`name`, fit to stand in one line of an error whoever wrote it."""
    return name if len(name) <= 120 and name.isprintable() else repr(name[:80]) + "..."


class Mapped:
    """Private mappings of files, by which their tensors are read: by safetensors, and for other
    files by PyTorch. Both map without a copy, but neither gives pages back: see `drop_pages`.

    Values that are not finite raise VicugnaError when they are read; with `later`, those of
    tensors that stay mapped are checked when `check` is called.
    """

    def __init__(self, later: bool = False) -> None:
        self._files: dict[Path, Any] = {}  # safetensors' handles, or bytes
        self._addresses: dict[Path, range] = {}
        self._later = later
        self.unchecked: list[tuple[Tensor, Stored]] = []

    def check(self) -> None:
        """Check the tensors that were left for later."""
        for tensor, stored in self.unchecked:
            _check(tensor, tensor, stored)
        self.unchecked = []

    def tensor(self, stored: Stored) -> Tensor:
        """A tensor as it is stored: no copy, and a write to it touches this process only.
        VicugnaError if the file has shrunk; OSError."""
        if stored.load is not None:
            return stored.load()
        if not stored.nbytes:
            return torch.empty(stored.shape, dtype=stored.dtype)
        try:
            tensor = self._mapped(stored)
        except (SafetensorError, RuntimeError) as error:
            raise broken(f"cannot be read: {str(error).splitlines()[0]}", stored.where) from error
        return tensor.clone() if tensor.data_ptr() % tensor.itemsize else tensor  # if not aligned

    def _mapped(self, stored: Stored) -> Tensor:
        file = stored.file
        if file.suffix != ".safetensors":
            flat = self._bytes(file, stored.begin, stored.nbytes)
            return torch.frombuffer(flat.numpy(), dtype=stored.dtype).view(stored.shape)
        if file not in self._files:
            self._files[file] = safe_open(file, "pt")
        tensor = self._files[file].get_tensor(stored.key or stored.name)
        address = tensor.data_ptr() - stored.begin
        self._addresses[file] = range(address, address + file.stat().st_size)
        return tensor

    def _bytes(self, file: Path, begin: int, count: int) -> Tensor:
        """Bytes of a file that is not safetensors."""
        if file not in self._files:
            size = file.stat().st_size
            self._files[file] = torch.from_file(str(file), shared=False, size=size,
                                                dtype=torch.uint8)
            address = self._files[file].data_ptr()
            self._addresses[file] = range(address, address + size)
        return self._files[file][begin : begin + count]

    @contextmanager
    def blocks(self, stored: Stored) -> Iterator[Blocks]:
        """The blocks of a `quantised` tensor, whose pages are given back at the end.
        VicugnaError for factors that are not finite, or if the file has shrunk; OSError."""
        held = stored.quantised
        assert held is not None
        try:
            parts = [self._bytes(stored.file, begin, math.prod(shape)).view(shape)
                     for begin, shape in held.parts]
        except RuntimeError as error:
            raise broken(f"cannot be read: {str(error).splitlines()[0]}", stored.where) from error
        for part in parts:
            _check_factors(held.kind, part, stored)
        yield Blocks(held.kind, held.shape, held.join(parts))
        for part in parts:
            self.drop_pages(part)

    def read(self, parts: Sequence[Stored], shape: Sequence[int], dtype: torch.dtype,
             device: torch.device) -> Tensor:
        """The tensor of `shape` whose equal parts, in order, are `parts`.

        A single part stored in that dtype stays mapped on the CPU. Otherwise parts are converted
        one by one into the result, and their pages given back: memory holds the result and at
        most one part more. VicugnaError for NaN, infinity and values that `dtype` cannot hold.
        """
        if len(parts) == 1 and parts[0].dtype == dtype and device.type == "cpu":
            whole = self.tensor(parts[0])
            self.unchecked.append((whole, parts[0]))
            if not self._later:
                self.check()
            return whole.reshape(tuple(shape))
        whole = torch.empty(tuple(shape), dtype=dtype, device=device)
        for part, place in zip(parts, whole.view(len(parts), *parts[0].shape), strict=True):
            source = self.tensor(part)
            if part.scale is None:
                place.copy_(source)
            else:
                _dequantise(place, source, self.tensor(part.scale), part.block)
            _check(place, source, part)
            self.drop_pages(source)
        return whole

    def drop_pages(self, tensor: Tensor) -> None:
        """Let the system have the memory of a mapped tensor, or of a part of its rows, that is no
        longer used. Nothing happens to other tensors."""
        begin = tensor.data_ptr()
        if any(begin in addresses for addresses in self._addresses.values()):
            page = begin // mmap.PAGESIZE * mmap.PAGESIZE
            _library().madvise(ctypes.c_void_p(page), ctypes.c_size_t(
                begin + tensor.nbytes - page), mmap.MADV_DONTNEED)


@cache
def _library() -> ctypes.CDLL:
    """The C library."""
    return ctypes.CDLL(None)


def _dequantise(place: Tensor, weight: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
    """place = weight * scale in float32, one row of blocks after the other; the last blocks of a
    row or column may be cut off by the edge."""
    rows, columns = block
    for n, factors in enumerate(scale.to(place.device)):
        band = slice(n * rows, (n + 1) * rows)
        wide = factors.repeat_interleave(columns)[: weight.shape[1]]
        place[band] = weight[band].to(place.device).float().mul_(wide)


def _check(tensor: Tensor, source: Tensor, stored: Stored) -> None:
    """Raise VicugnaError unless all values of `tensor`, made from `source`, are finite."""
    # A sum is one pass at the speed of memory, and not finite if any value is not; of finite ones
    # it may overflow. The smallest and the largest value are NaN if any is.
    if (not tensor.numel() or math.isfinite(tensor.sum())
            or all(map(math.isfinite, tensor.aminmax()))):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if source.dtype != FP8 and bool(torch.isfinite(source).all()):
        raise VicugnaError(f"{bad:,} of {tensor.numel():,} values are too large for {tensor.dtype}",
                           stored.where, "Load it in the dtype it is stored in, or as float32")
    raise VicugnaError(f"{bad:,} of {tensor.numel():,} values are NaN or infinite", stored.where,
                       "Use a checkpoint from before the training diverged")


def _check_factors(kind: str, rows: Tensor, stored: Stored) -> None:
    """Raise VicugnaError unless the factors of all blocks are finite, and with them all values."""
    size, places = BLOCKS[kind]
    for at in places:
        high = rows.reshape(-1, size)[:, at + 1]  # the sign and exponent of a little-endian float16
        if bad := int(((high & 0x7C) == 0x7C).sum()):
            raise VicugnaError(f"{bad:,} of {len(high):,} factors of {kind} blocks are NaN or "
                               "infinite", stored.where, "Download or write the checkpoint again")


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major; no copy if it is contiguous on the CPU."""
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
