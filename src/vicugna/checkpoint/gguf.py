"""GGUF, llama.cpp's file of weights, hyperparameters and tokenizer in one: read and written.

Quantisation and writing are those of the package `gguf` (the extra `gguf`); what tensors keep their
precision follows llama.cpp's converter and quantiser.

What we write carries config.json and the tokenizer's files as keys of their own (`vicugna.*`,
`tokenizer.huggingface.json`), which llama.cpp skips: reading it gives the same model back. That
config is believed only if it says what GGUF's own keys say.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vicugna.checkpoint import gguf_keys, gguf_vocabulary
from vicugna.checkpoint.directory import JSON_BYTES, Survey, default_generation_config
from vicugna.checkpoint.gguf_file import (
    ARRAY,
    BF16,
    BOOL,
    DTYPES,
    F16,
    F32,
    FLOAT32,
    Q4_0,
    Q8_0,
    STRING,
    UINT32,
    Entry,
    Forget,
    decode,
    encode,
    package,
    scan,
)
from vicugna.checkpoint.gguf_keys import ARCHITECTURES
from vicugna.checkpoint.gguf_tensors import (
    FREQUENCIES,
    PLAIN,
    Form,
    Group,
    forms,
    groups,
    our_name,
)
from vicugna.checkpoint.weights import Stored, broken, short
from vicugna.errors import VicugnaError

EXPERTS = 2**12
KINDS = {"float32": F32, "float16": F16, "bfloat16": BF16, "q8_0": Q8_0, "q4_0": Q4_0}
FILE_TYPES = {F32: 0, F16: 1, Q4_0: 2, Q8_0: 7, BF16: 32}  # llama.h: llama_ftype
STORED = {dtype: kind for kind, dtype in DTYPES.items()}
KEY_TYPES = {bool: BOOL, int: UINT32, float: FLOAT32, str: STRING, list: ARRAY}


# From a file to a checkpoint.

def survey(path: Path) -> Survey:
    """What a GGUF file says of itself, as if it were a Hugging Face folder.
    Raises VicugnaError; OSError."""
    metadata, entries = scan(path)
    try:
        config = _config(metadata, entries)
        generation = json.loads(metadata.get("vicugna.generation_config", "null"))
        tokenizer, files = gguf_vocabulary.restore(metadata, config, generation or {})
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
    architecture = str(metadata.get("general.architecture"))
    if architecture not in ARCHITECTURES.values():
        raise VicugnaError(f"architecture {short(architecture)} is not read from GGUF", "",
                           f"Known: {', '.join(sorted({*ARCHITECTURES.values()}))}")
    found = {key.removeprefix(f"{architecture}."): gguf_keys.one(value)
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
            said = {key: gguf_keys.one(value)
                    for key, value in gguf_keys.hyperparameters(written).items()}
            if (ARCHITECTURES[written["model_type"]] == architecture and said == found
                    and gguf_keys.agree(gguf_keys.rope_factors(written), factors)):
                return written
        except VicugnaError:
            pass
    return gguf_keys.foreign_config(architecture, found, factors,
                                    {name: entry.shape for name, entry in entries.items()})


def _tensors(config: Mapping[str, Any], entries: Mapping[str, Entry], path: Path
             ) -> dict[str, Stored]:
    """The tensors by their Hugging Face names. Norms and biases, which are F32 in every file, take
    the dtype of the matrices where it holds them exactly; the biases by which experts are chosen
    are float32 in folders too."""
    kinds = {entry.kind for entry in entries.values() if len(entry.shape) > 1} - {F32}
    narrow = DTYPES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32
    lying, parts = forms(config), dict[str, list[Entry | None]]()
    found: dict[str, Stored] = {}
    for stored, entry in entries.items():
        if stored == FREQUENCIES:
            continue
        name, inner, n, count = our_name(stored, config["model_type"])
        if "*" in name and entry.shape[0] > EXPERTS:
            raise broken(f"{entry.shape[0]:,} experts", f"tensor {short(stored)}")
        parts.setdefault(name, [None] * count)[n] = entry
        if None in parts[name]:
            continue
        whole = [part for part in parts.pop(name) if part is not None]
        form = lying.get(inner, PLAIN)
        for expert in range(entry.shape[0]) if "*" in name else [None]:
            ours = name.replace("*", str(expert))
            found[ours] = _stored(ours, path, whole, expert, form, narrow)
    if parts:
        raise broken(f"half of tensor {short(min(parts))} is missing", "")
    return found


def _stored(name: str, path: Path, entries: Sequence[Entry], expert: int | None, form: Form,
            narrow: torch.dtype) -> Stored:
    """A tensor of a folder that these entries hold, or an expert's part of one entry."""
    kept = dtype = DTYPES.get(entries[0].kind, torch.float32)
    for entry in entries[1:]:
        kept = dtype = torch.promote_types(dtype, DTYPES.get(entry.kind, torch.float32))
    if dtype != narrow and not name.endswith("e_score_correction_bias"):
        values = [decode(entry, expert).to(kept) for entry in entries]
        if all(torch.equal(part.to(narrow).to(kept), part) for part in values):
            dtype = narrow
    shapes = [entry.shape if expert is None else entry.shape[1:] for entry in entries]
    if form is PLAIN and entries[0].kind in DTYPES and dtype == kept:  # as it lies
        begin = entries[0].begin + (expert or 0) * math.prod(shapes[0]) * dtype.itemsize
        return Stored(name, path, begin, dtype, shapes[0])
    shape = shapes[0] if form is PLAIN else tuple(
        form.join([torch.empty(shape, device="meta") for shape in shapes]).shape)
    return Stored(name, path, entries[0].begin, dtype, shape,
                  load=partial(_load, entries, expert, form, dtype))


def _load(entries: Sequence[Entry], expert: int | None, form: Form, dtype: torch.dtype) -> Tensor:
    return form.join([decode(entry, expert).to(dtype) for entry in entries]).contiguous()


# From a checkpoint to a file.

def text_part(found: Survey, tensors: Mapping[str, Stored]) -> tuple[Survey, dict[str, Stored]]:
    """Of a checkpoint with eyes, and those of its tensors that count, what a file can hold: the
    text model, as a checkpoint of its own."""
    if found.config.get("model_type") != "llama4":
        return found, dict(tensors)
    inside = {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()
              if name.startswith("language_model.")}
    return (replace(found, config=gguf_keys.text_config(found.config)),
            {name: replace(tensor, name=name) for name, tensor in inside.items()})


def write(path: Path, found: Survey, tensors: Mapping[str, Stored], dtype: str | None,
          load: Callable[[Stored], Tensor], cast: Callable[..., Tensor], forget: Forget) -> None:
    """Write a checkpoint as a GGUF file: `tensors` are those of `found` to write, `dtype` one of
    KINDS, or None to keep what is stored; `load` gives a tensor as it is stored, `cast` (as
    `Losses.cast`) one in a dtype, `forget` (as `Mapped.forget`) is told of rows that are done with.

    Memory holds the largest tensor of the file. VicugnaError for what GGUF cannot represent.
    """
    gguf, config = package(), found.config
    factors, wanted = gguf_keys.rope_factors(config), KINDS.get(dtype or "")
    planned = groups(config, tensors)
    kinds = {name: _kind(name, shape, group.sources[0], wanted, config)
             for group in planned for name, shape in zip(group.names, group.shapes, strict=True)}
    keys = _keys(found, kinds["token_embd.weight"] if wanted is None else wanted)
    with closing(gguf.GGUFWriter(path, ARCHITECTURES[config["model_type"]])) as writer:
        for key, value in keys.items():
            writer.add_key_value(key, value, gguf.GGUFValueType(KEY_TYPES[type(value)]))
        if factors is not None:
            writer.add_tensor_info(FREQUENCIES, factors.shape, np.dtype("f4"), factors.nbytes)
        for group in planned:
            for name, shape in zip(group.names, group.shapes, strict=True):
                values, size = gguf.GGML_QUANT_SIZES[kinds[name]]
                writer.add_tensor_info(name, shape, np.dtype("f4"), math.prod(shape) // values
                                       * size, gguf.GGMLQuantizationType(kinds[name]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for group in planned:
            for rows in _made(group, kinds, load, cast, forget):
                writer.write_tensor_data(rows)


def _made(group: Group, kinds: Mapping[str, int], load: Callable[[Stored], Tensor],
          cast: Callable[..., Tensor], forget: Forget) -> Iterator[np.ndarray]:
    """The tensors of a group, one after the other; a source of several is loaded once."""
    only = load(group.sources[0]) if group.names[1:] else None
    for n, name in enumerate(group.names):
        parts = (group.form.split(load(source) if only is None else only)[n]
                 for source in group.sources)
        yield _bytes(parts, group.sources, kinds[name], cast, forget)


def _bytes(parts: Iterable[Tensor], sources: Sequence[Stored], kind: int,
           cast: Callable[..., Tensor], forget: Forget) -> np.ndarray:
    """A tensor of a file, made of parts of these sources. Matrices of a stack are turned into its
    GGML type one by one: together they would take several times their memory."""
    whole = None
    for n, (part, source) in enumerate(zip(parts, sources, strict=True)):
        stacked = part.dim() == 3
        blocks = part.unbind() if stacked else (part,)
        for m, block in enumerate(blocks):
            single = torch.float32 if block.dtype == torch.float64 else block.dtype
            values = cast(block, DTYPES.get(kind, single), source.name,
                          f"[{m}]" if stacked else "")
            rows = encode(values, kind, forget)
            if len(sources) == len(blocks) == 1:
                return rows
            if whole is None:
                whole = np.empty((len(sources) * len(blocks), *rows.shape), rows.dtype)
            whole[n * len(blocks) + m] = rows
    assert whole is not None  # there are sources, and no matrices of no rows
    return whole


def _keys(found: Survey, kind: int) -> dict[str, Any]:
    """All keys of the file of a checkpoint whose matrices are mostly of GGML type `kind`."""
    prefix = ARCHITECTURES[found.config["model_type"]]
    keys = {f"{prefix}.{key}": value for key, value in
            gguf_keys.hyperparameters(found.config).items()}
    keys |= gguf_vocabulary.describe(found.tokenizer, found.files, found.config)
    keys |= {"general.type": "model", "general.file_type": FILE_TYPES[kind],
             "general.quantization_version": package().GGML_QUANT_VERSION,
             "vicugna.config": json.dumps(found.config, ensure_ascii=False, sort_keys=True),
             "vicugna.generation_config": json.dumps(found.generation_config, sort_keys=True)}
    return {key: value for key, value in keys.items() if value != []}  # GGUF has no empty lists


def _kind(name: str, shape: Sequence[int], source: Stored, wanted: int | None,
          config: Mapping[str, Any]) -> int:
    """The GGML type of a tensor, as llama.cpp's converter and quantiser choose it. What they give
    Q6_K, which the package cannot write, is Q8_0 here."""
    if len(shape) < 2 or name.endswith("_norm.weight") or "ffn_gate_inp" in name:
        return F32
    if wanted is None:
        return STORED.get(source.kind, F32)
    if wanted in DTYPES:
        return wanted
    if shape[-1] % 32:  # rows that do not fill blocks
        return F16
    last = "token_embd.weight" if config.get("tie_word_embeddings") else "output.weight"
    small = config.get("num_local_experts") == 8 and ("attn_k." in name or "attn_v." in name)
    return Q8_0 if name == last or small else wanted
