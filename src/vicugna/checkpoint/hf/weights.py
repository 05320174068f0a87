"""Safetensors files: headers are checked before a byte is mapped.

Format: 8 bytes (little-endian length of the header), the header as JSON, the tensors' bytes without
gaps (https://github.com/huggingface/safetensors#format).
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vicugna.checkpoint import foreign
from vicugna.checkpoint.stored import FP8, Mapped, Stored, broken, merged, raw_bytes, short, where
from vicugna.errors import VicugnaError
from vicugna.files import write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES, SHARD_TENSORS = 5 * 10**9, 10_000
HEADER_BYTES = 3 * 10**6  # some 25,000 tensors in one file; more only serves to use up time
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SCALE = "_scale_inv"
# Of torch.compile, FSDP and activation checkpointing, which may wrap parts of a model as well; and
# of DistributedDataParallel, DeepSpeed, PEFT and Lightning, which wrap the whole.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PREFIXES = ("module.", "_forward_module.", "base_model.model.", "model.")
LORA = re.compile(r"\.(lora_\w+|base_layer)(\.|$)")


def scan(files: Iterable[Path]) -> dict[str, Stored]:
    """Every tensor of `files` by name, from their headers alone.
    VicugnaError for a malformed file and for a name that occurs in two; OSError."""
    return merged(map(_read_header, files))


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
        raise ValueError(f"{short(name)} occurs twice")
    return found


def _check_entry(name: str, entry: Any, path: Path, start: int) -> Stored:
    """The tensor that an entry of the header describes; the tensors' bytes begin at `start`."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise broken("needs exactly dtype, shape and data_offsets", where(path, name))
    dtype = FP8 if entry["dtype"] == "F8_E4M3" else DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise VicugnaError(f"stored as {short(str(entry['dtype']))}, which is not read",
                           where(path, name), f"Convert the weights to one of {', '.join(DTYPES)}")
    shape, span = entry["shape"], entry["data_offsets"]
    if not (isinstance(shape, list) and len(shape) <= 8 and isinstance(span, list)
            and len(span) == 2 and all(type(n) is int and 0 <= n < 2**63 for n in shape + span)):
        raise broken("its shape or offsets are not lists of sizes", where(path, name))
    tensor = Stored(name, path, start + span[0], dtype, tuple(shape))
    if (given := span[1] - span[0]) != tensor.nbytes:
        raise broken(f"shape {shape} of {entry['dtype']} takes {tensor.nbytes:,} bytes, but the "
                     f"header gives it {given:,}", tensor.where)
    return tensor


def unwrapped(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """`stored` by the names of the model itself, where what wrapped it when it was saved put names
    of its own before all of them. VicugnaError for unmerged LoRA weights."""
    names = {name: WRAPPERS.sub("", name) for name in stored}
    while prefix := next((prefix for prefix in PREFIXES if all(
            name.startswith(prefix) for name in names.values())), None) if names else None:
        if prefix == "model." and not any(x.startswith("model.model.") for x in names.values()):
            break  # the model's own
        names = {name: new.removeprefix(prefix) for name, new in names.items()}
    for name, new in names.items():
        if LORA.search(new):
            raise VicugnaError("a LoRA adapter that was not merged into the weights",
                               stored[name].where, foreign.MERGE)
    found = {new: stored[name] if new == name else stored[name].renamed(new)
             for name, new in names.items()}
    if len(found) < len(stored):
        raise broken("with the wrappers' names taken off, some tensors have the same name",
                     next(iter(stored.values())).file)
    return found


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
