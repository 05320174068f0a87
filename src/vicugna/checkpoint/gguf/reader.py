"""A GGUF file as a checkpoint.

A config.json that the file carries (`vicugna.config`: we wrote it) is believed only if it says what
GGUF's own keys say.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vicugna.checkpoint.folder import JSON_BYTES
from vicugna.checkpoint.foreign import start
from vicugna.checkpoint.gguf import keys, vocabulary
from vicugna.checkpoint.gguf.file import DTYPES, F32, MAGIC, Entry, decode, scan, type_name
from vicugna.checkpoint.gguf.keys import ARCHITECTURES
from vicugna.checkpoint.gguf.tensors import FREQUENCIES, PLAIN, Layout, hf_name, in_layer, layouts
from vicugna.checkpoint.stored import BLOCKS, Quantised, Stored, broken, short
from vicugna.checkpoint.survey import Survey, default_generation_config
from vicugna.errors import VicugnaError

EXPERTS = 2**12
SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
KINDS_OF_FILES = {"mmproj": "the vision encoder of a model (mmproj)", "adapter": "a LoRA adapter",
                  "imatrix": "an importance matrix"}


def recognises(path: Path) -> bool:
    """Whether `path` is a GGUF file, by its first bytes or its name, or a folder with some."""
    if path.is_dir():
        return bool(_files(path))
    return path.is_file() and (path.suffix.lower() == ".gguf" or start(path) == MAGIC)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf"
                  or (path.is_file() and start(path) == MAGIC))


def _chosen(folder: Path) -> Path:
    """The one model in a folder of GGUF files; VicugnaError if it has several."""
    files = _files(folder)
    models = [path for path in files if "mmproj" not in path.name.lower()] or files
    if len(models) > 1 and not all(SHARD.search(path.name) for path in models):
        names = ", ".join(path.name for path in models[:5]) + ", ..." * (len(models) > 5)
        raise VicugnaError(f"{len(models)} GGUF files: {names}", str(folder),
                           f"Name one of them: {models[0]}")
    return models[0]


def survey(path: Path) -> Survey:
    """The survey of a GGUF file, as of a Hugging Face folder.
    Raises VicugnaError; OSError."""
    path = _chosen(path) if path.is_dir() else path
    metadata, entries = scan(path)
    try:
        config = _config(metadata, entries)
        generation = json.loads(metadata.get("vicugna.generation_config", "null"))
        tokenizer, files = vocabulary.restore(metadata, config, generation or {})
        if generation is None:
            generation = default_generation_config(tokenizer)
            config = generation | config
        return Survey(path, config, _tensors(config, entries, path), tokenizer, generation, files)
    except VicugnaError as error:
        raise VicugnaError(error.what, f"{path} {error.where}".strip(), error.fix) from error
    except Exception as error:  # of keys of any type, and of the tokenizer library
        raise broken(f"its keys make no model: {type(error).__name__} {short(str(error))}", path
                     ) from error


def _config(metadata: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Any]:
    """config.json: the one that we wrote, if GGUF's own keys say the same; else made from them."""
    architecture, kind = (str(metadata.get(f"general.{key}")) for key in ("architecture", "type"))
    if architecture == "clip" or kind in KINDS_OF_FILES:
        raise VicugnaError(KINDS_OF_FILES.get(kind, KINDS_OF_FILES["mmproj"]) + ", not a model", "",
                           "Name the GGUF file of the model itself")
    if architecture not in ARCHITECTURES.values():
        raise VicugnaError(f"architecture {short(architecture)} is not read from GGUF", "",
                           f"Known: {', '.join(sorted({*ARCHITECTURES.values()}))}")
    found = {key.removeprefix(f"{architecture}."): keys.one(value)
             for key, value in metadata.items() if key.startswith(f"{architecture}.")}
    factors = decode(entries[FREQUENCIES]) if FREQUENCIES in entries else None
    text = metadata.get("vicugna.config", "null")
    if len(text) > JSON_BYTES:
        raise broken(f"key vicugna.config has over {JSON_BYTES:,} characters", "")
    written = json.loads(text)
    for layers in (found.get("block_count"), written and written.get("num_hidden_layers")):
        if type(layers) is int and layers > len(entries):  # or lists of them might fill memory
            raise broken(f"it has {layers:,} layers, but only {len(entries):,} tensors", "")
    if written is not None:
        try:
            expected = {key: keys.one(value)
                    for key, value in keys.hyperparameters(written).items()}
            if (ARCHITECTURES[written["model_type"]] == architecture and expected == found
                    and keys.agree(keys.rope_factors(written), factors)):
                return written
        except VicugnaError:
            pass
    return keys.foreign_config(architecture, found, factors,
                                    {name: entry.shape for name, entry in entries.items()})


def _tensors(config: Mapping[str, Any], entries: Mapping[str, Entry], path: Path
             ) -> dict[str, Stored]:
    """The tensors by their Hugging Face names. Norms and biases, which are F32 in every file, take
    the dtype of the matrices where it holds them exactly; a router's e_score_correction_bias is
    float32 in folders too."""
    kinds = {entry.kind for entry in entries.values() if len(entry.shape) > 1} - {F32}
    narrow = DTYPES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32
    special, found = layouts(config), dict[str, Stored]()
    for stored, entry in entries.items():
        if stored == FREQUENCIES:
            continue
        name, parts = hf_name(stored, config["model_type"])
        if not entries.keys() >= {*parts}:
            raise broken(f"a part of tensor {short(name)} is missing", "")
        if stored != parts[0]:
            continue
        if "*" in name and entry.shape[0] > EXPERTS:
            raise broken(f"{entry.shape[0]:,} experts", f"tensor {short(stored)}")
        whole, layout = [entries[part] for part in parts], special.get(in_layer(name), PLAIN)
        for expert in range(entry.shape[0]) if "*" in name else [None]:
            ours = name.replace("*", str(expert))
            found[ours] = _stored(ours, path, whole, expert, layout, narrow)
    return found


def _stored(name: str, path: Path, entries: Sequence[Entry], expert: int | None, layout: Layout,
            narrow: torch.dtype) -> Stored:
    """A tensor of a folder that these entries hold, or an expert's part of one entry."""
    widest = dtype = DTYPES.get(entries[0].kind, torch.float32)
    for entry in entries[1:]:
        widest = dtype = torch.promote_types(dtype, DTYPES.get(entry.kind, torch.float32))
    if dtype != narrow and not name.endswith("e_score_correction_bias"):
        values = [decode(entry, expert).to(widest) for entry in entries]
        if all(torch.equal(part.to(narrow).to(widest), part) for part in values):
            dtype = narrow
    shapes = [entry.shape if expert is None else entry.shape[1:] for entry in entries]
    if layout is PLAIN and entries[0].kind in DTYPES and dtype == widest:  # mapped as it is
        begin = entries[0].begin + (expert or 0) * math.prod(shapes[0]) * dtype.itemsize
        return Stored(name, path, begin, dtype, shapes[0])
    shape = shapes[0] if layout is PLAIN else tuple(
        layout.join([torch.empty(shape, device="meta") for shape in shapes]).shape)
    return Stored(name, path, entries[0].begin, dtype, shape,
                  load=partial(_load, entries, expert, layout, dtype),
                  quantised=_quantised(entries, expert, layout))


def _quantised(entries: Sequence[Entry], expert: int | None, layout: Layout) -> Quantised | None:
    """How to read the tensor's blocks; None for floats, types without kernels, and tensors that
    are not made of whole rows of the file's."""
    kind = type_name(entries[0].kind).lower()
    if kind not in BLOCKS or layout.rows is None or len({entry.kind for entry in entries}) > 1:
        return None
    parts = []
    for entry in entries:
        count, shape = entry.data.nbytes, (*entry.shape[:-1], -1)
        if expert is not None:
            count, shape = count // entry.shape[0], shape[1:]
        rows = math.prod(shape[:-1])
        parts.append((entry.begin + (expert or 0) * count, (*shape[:-1], count // rows)))
    joined = layout.rows([torch.empty(shape, device="meta") for _, shape in parts])
    return Quantised(kind, (*joined.shape[:-1], entries[0].shape[-1]), tuple(parts), layout.rows)


def _load(entries: Sequence[Entry], expert: int | None, layout: Layout, dtype: torch.dtype
          ) -> Tensor:
    return layout.join([decode(entry, expert).to(dtype) for entry in entries]).contiguous()
