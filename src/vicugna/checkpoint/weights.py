"""Safetensors files: headers are checked before a byte is mapped, tensors are mapped, not read.

Format: 8 bytes (little-endian length of the header), the header as JSON, the tensors' bytes without
gaps (https://github.com/huggingface/safetensors#format).
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vicugna.errors import VicugnaError
from vicugna.files import write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
HEADER_BYTES = 4 * 10**6  # some 30,000 tensors in one file; more only serves to use up time
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, its dtype and its shape, as the header says."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


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
    found = [_check_entry(name, entry, path) for name, entry in header.items()]
    reached = 0
    for begin, end, name, _ in sorted(found):
        if begin != reached:
            what = "overlaps the one before it" if begin < reached else "leaves a gap before it"
            raise broken(f"tensor {short(name)} {what}", path)
        reached = end
    if (held := size - 8 - length) != reached:
        raise broken(("truncated: " if held < reached else "") + f"the header promises {reached:,} "
                     f"bytes of tensors, the file holds {held:,}", path)
    return {name: tensor for _, _, name, tensor in found}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    (name, times), = Counter(name for name, _ in pairs).most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f"{short(name)} stands in it twice")
    return dict(pairs)


def _check_entry(name: str, entry: Any, path: Path) -> tuple[int, int, str, Stored]:
    """Begin, end and name of the tensor that an entry of the header describes, and itself."""
    where = f"{path} tensor {short(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise broken("needs exactly dtype, shape and data_offsets", where)
    dtype = DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise VicugnaError(f"stored as {short(str(entry['dtype']))}, which is not read", where,
                           f"Convert the weights to one of {', '.join(DTYPES)}")
    shape, span = entry["shape"], entry["data_offsets"]
    if not (isinstance(shape, list) and len(shape) <= 8 and isinstance(span, list)
            and len(span) == 2 and all(type(n) is int and 0 <= n < 2**63 for n in shape + span)):
        raise broken("its shape or offsets are not lists of sizes", where)
    nbytes, given = math.prod(shape) * dtype.itemsize, span[1] - span[0]
    if given != nbytes:
        raise broken(f"shape {shape} of {entry['dtype']} takes {nbytes:,} bytes, but the header "
                     f"gives it {given:,}", where)
    return span[0], span[1], name, Stored(path, dtype, tuple(shape))


def short(name: str) -> str:
    """`name`, fit to stand in one line of an error whoever wrote it."""
    return name if len(name) <= 120 and name.isprintable() else repr(name[:80]) + "..."


def read(stored: Mapping[str, Stored], dtypes: Mapping[str, torch.dtype], device: torch.device
         ) -> dict[str, Tensor]:
    """The tensors themselves, each in its dtype of `dtypes`, on `device`.

    One that is stored in that dtype and stays on the CPU is a private mapping of the file: no
    copy, and a write to it touches this process only. VicugnaError for NaN or infinity; OSError.
    """
    result = {}
    for path, names in groupby(sorted(stored, key=lambda n: stored[n].file),
                               key=lambda n: stored[n].file):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in names:
                    tensor = file.get_tensor(name).to(device=device, dtype=dtypes[name])
                    # The smallest and the largest value are NaN if any is: one quick pass.
                    if tensor.numel() and not all(map(math.isfinite, tensor.aminmax())):
                        bad = int((~torch.isfinite(tensor)).sum())
                        raise VicugnaError(f"{bad:,} of {tensor.numel():,} values are NaN or "
                                           "infinite", f"{path} tensor {short(name)}",
                                           "Use a checkpoint from before the training diverged")
                    result[name] = tensor
        except SafetensorError as error:
            raise broken(f"cannot be read: {error}", path) from error
    return result


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major; no copy if it is contiguous on the CPU."""
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write float `tensors` as model.safetensors, or as shards of at most SHARD_BYTES and an index.

    The bytes depend on names, dtypes, shapes and values alone. The caller makes the whole of
    `folder` atomic and durable. Raises VicugnaError or OSError.
    """
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in sorted(tensors.items()):
        filled += tensor.nbytes
        if shards[-1] and filled > SHARD_BYTES:
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


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
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
            file.write(raw_bytes(tensor))
