"""Safetensors files: headers are checked before a byte is mapped, tensors are mapped, not read.

Format: 8 bytes (little-endian length of the header), the header as JSON, the tensors' bytes without
gaps (https://github.com/huggingface/safetensors#format). An FP8 tensor NAME is stored with
NAME_scale_inv, a float32 factor for each block of it, as DeepSeek V3 publishes its weights
(arXiv 2412.19437, section 3.3).
"""

import json
import math
import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vicugna.errors import VicugnaError
from vicugna.files import write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES, SHARD_TENSORS = 5 * 10**9, 10_000
HEADER_BYTES = 3 * 10**6  # some 25,000 tensors in one file; more only serves to use up time
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FP8, SCALE = torch.float8_e4m3fn, "_scale_inv"


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, its dtype and its shape, as the header says.

    An FP8 tensor's `scale` has one factor for each `block` (rows, columns) of it. Where a file does
    not hold the tensor as it is, `load` makes it.
    """

    name: str
    file: Path
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    scale: "Stored | None" = None
    block: tuple[int, int] = (1, 1)
    load: Callable[[], Tensor] | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def kind(self) -> torch.dtype:
        """The dtype that stands for what is stored: FP8 needs its factors, so it is bfloat16."""
        return torch.bfloat16 if self.dtype == FP8 else self.dtype

    @property
    def where(self) -> str:
        return _where(self.file, self.name)


def broken(what: str, where: str | Path) -> VicugnaError:
    """The error for a file that no correct writer makes."""
    return VicugnaError(what, str(where), "Download or write the checkpoint again")


def scan(files: Iterable[Path]) -> dict[str, Stored]:
    """Every tensor of `files` by name, from their headers alone.
    VicugnaError for a malformed file and for a name that stands in two; OSError."""
    found: dict[str, Stored] = {}
    for file in files:
        tensors = _read_header(file)
        for name in sorted(tensors.keys() & found.keys()):
            raise broken(f"tensor {short(name)} stands in {found[name].file.name} too", file)
        found |= tensors
    return found


def _read_header(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_BYTES):
                raise broken(f"truncated, or not safetensors: a header of {length:,} bytes in a "
                             f"file of {size:,}", path)
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise broken(f"its header is not valid: {error}", path) from error
    if not isinstance(header, dict):
        raise broken("its header is not a JSON object", path)
    header.pop("__metadata__", None)
    found = [_check_entry(name, entry, path, 8 + length) for name, entry in header.items()]
    reached = 8 + length
    for tensor in sorted(found, key=lambda t: (t.begin, t.nbytes, t.name)):
        if tensor.begin != reached:
            raise broken(("overlaps the one" if tensor.begin < reached else "leaves a gap")
                         + " before it", tensor.where)
        reached += tensor.nbytes
    if size != reached:
        raise broken(("truncated: " if size < reached else "") + f"the header promises "
                     f"{reached - 8 - length:,} bytes of tensors, the file holds "
                     f"{size - 8 - length:,}", path)
    return {tensor.name: tensor for tensor in found}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{short(name)} stands in it twice")
    return found


def _check_entry(name: str, entry: Any, path: Path, start: int) -> Stored:
    """The tensor that an entry of the header describes; the tensors' bytes begin at `start`."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise broken("needs exactly dtype, shape and data_offsets", _where(path, name))
    dtype = FP8 if entry["dtype"] == "F8_E4M3" else DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise VicugnaError(f"stored as {short(str(entry['dtype']))}, which is not read",
                           _where(path, name), f"Convert the weights to one of {', '.join(DTYPES)}")
    shape, span = entry["shape"], entry["data_offsets"]
    if not (isinstance(shape, list) and len(shape) <= 8 and isinstance(span, list)
            and len(span) == 2 and all(type(n) is int and 0 <= n < 2**63 for n in shape + span)):
        raise broken("its shape or offsets are not lists of sizes", _where(path, name))
    tensor = Stored(name, path, start + span[0], dtype, tuple(shape))
    if (given := span[1] - span[0]) != tensor.nbytes:
        raise broken(f"shape {shape} of {entry['dtype']} takes {tensor.nbytes:,} bytes, but the "
                     f"header gives it {given:,}", tensor.where)
    return tensor


def _where(path: Path, name: str) -> str:
    return f"{path} tensor {short(name)}"


def scaled(stored: Mapping[str, Stored], block: tuple[int, int] | None) -> dict[str, Stored]:
    """`stored` with every FP8 tensor joined to its scale; `block` None means there should be none.
    VicugnaError where a scale is missing or has another shape than the blocks."""
    joined = dict(stored)
    for name, tensor in stored.items():
        if tensor.dtype != FP8:
            continue
        if block is None:
            raise broken("stored as F8_E4M3, but config.json says nothing of FP8", tensor.where)
        scale = joined.pop(name + SCALE, None)
        due = tuple(-(-size // step) for size, step in zip(tensor.shape, block, strict=False))
        if len(tensor.shape) != 2 or scale is None or (scale.dtype, scale.shape) != (
                torch.float32, due):
            raise broken(f"no float32 {short(name + SCALE)} of shape {list(due)} scales it",
                         tensor.where)
        joined[name] = replace(tensor, scale=scale, block=block)
    return joined


def short(name: str) -> str:
    """`name`, fit to stand in one line of an error whoever wrote it."""
    return name if len(name) <= 120 and name.isprintable() else repr(name[:80]) + "..."


class Mapped:
    """Private mappings of safetensors files, by which their tensors are read.

    Values that are not finite raise VicugnaError when they are read; with `later`, those of
    tensors that stay mapped are not looked at before `check` is called.
    """

    def __init__(self, later: bool = False) -> None:
        self._files: dict[Path, tuple[mmap.mmap, int]] = {}  # each with its address
        self._later = later
        self.unchecked: list[tuple[Tensor, Stored]] = []

    def check(self) -> None:
        """Look at the tensors that were left for later."""
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
        if stored.file not in self._files:
            with open(stored.file, "rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            begin = torch.frombuffer(mapping, dtype=torch.uint8, count=1).data_ptr()
            self._files[stored.file] = mapping, begin
        try:
            flat = torch.frombuffer(self._files[stored.file][0], dtype=torch.uint8,
                                    count=stored.nbytes, offset=stored.begin)
        except ValueError as error:
            raise broken(f"cannot be read: {error}", stored.where) from error
        if stored.begin % stored.dtype.itemsize:  # not aligned to its elements
            flat = flat.clone()
        return flat.view(stored.dtype).view(stored.shape)

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
            self.forget(source)
        return whole

    def forget(self, tensor: Tensor) -> None:
        """Let the system have the memory of a mapped tensor, or of a part of its rows, that is no
        longer used. Nothing happens to other tensors."""
        for mapping, address in self._files.values():
            begin = tensor.data_ptr() - address
            if 0 <= begin < len(mapping):
                page = begin // mmap.PAGESIZE * mmap.PAGESIZE
                mapping.madvise(mmap.MADV_DONTNEED, page, begin + tensor.nbytes - page)


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


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major; no copy if it is contiguous on the CPU."""
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def write(folder: Path, tensors: Mapping[str, Tensor | Stored]) -> None:
    """Write float `tensors` as model.safetensors, or as an index and shards of at most SHARD_BYTES
    and SHARD_TENSORS, which `scan` takes. Those that are still stored elsewhere are read one by
    one.

    The bytes depend on names, dtypes, shapes and values alone. The caller makes the whole of
    `folder` atomic and durable. Raises VicugnaError or OSError.
    """
    shards: list[dict[str, Tensor | Stored]] = [{}]
    filled = 0
    for name, tensor in sorted(tensors.items()):
        filled += tensor.nbytes
        if shards[-1] and (filled > SHARD_BYTES or len(shards[-1]) == SHARD_TENSORS):
            shards.append({})
            filled = tensor.nbytes
        shards[-1][name] = tensor
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if shards[1:] else SINGLE
        _write_file(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    if shards[1:]:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_file(path: Path, tensors: Mapping[str, Tensor | Stored]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wide dtypes first, so that every tensor is aligned to its own element.
    order = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, tensor in order:
        if tensor.dtype not in NAMES:
            raise VicugnaError(f"{tensor.dtype} cannot be written", f"tensor {name}",
                               f"Convert it to one of {', '.join(DTYPES)}")
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset := offset + tensor.nbytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in order:
            file.write(raw_bytes(Mapped().tensor(tensor) if isinstance(tensor, Stored) else tensor))
