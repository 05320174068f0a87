"""A checkpoint to a GGUF file.

Quantisation and writing are those of the package `gguf` (the extra `gguf`); which tensors are not
quantised follows llama.cpp's converter and quantiser.

What we write carries config.json and the tokenizer's files as keys of their own (`vicugna.*`,
`tokenizer.huggingface.json`), which llama.cpp skips: reading it gives the same model back.
"""

import json
import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vicugna.checkpoint.conversion import Conversion
from vicugna.checkpoint.gguf import file as ggml
from vicugna.checkpoint.gguf import keys, vocabulary
from vicugna.checkpoint.gguf.keys import ARCHITECTURES
from vicugna.checkpoint.gguf.tensors import FREQUENCIES, Target, targets
from vicugna.checkpoint.stored import Stored
from vicugna.checkpoint.survey import Survey


def note_losses(conversion: Conversion, config: Mapping[str, Any], dtype: str | None,
                passthrough: int) -> None:
    """Note what is lost in GGUF whatever the values are."""
    for what in keys.lost(config):
        conversion.note(what)
    if passthrough:
        conversion.note(f"{passthrough:,} tensors that the model does not compute with")
    if dtype in ("q8_0", "q4_0"):
        conversion.note(f"precision: {dtype} rounds the weights in blocks of 32")


def text_part(found: Survey, tensors: Mapping[str, Stored]) -> tuple[Survey, dict[str, Stored]]:
    """The text model of a checkpoint, which is all that a file can hold, as a checkpoint of its
    own, with its tensors."""
    if found.config.get("model_type") != "llama4":
        return found, dict(tensors)
    inside = {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()
              if name.startswith("language_model.")}
    return (replace(found, config=keys.text_config(found.config)),
            {name: tensor.renamed(name) for name, tensor in inside.items()})


def write(path: Path, found: Survey, tensors: Mapping[str, Stored], dtype: str | None,
          conversion: Conversion) -> None:
    """Write a checkpoint as a GGUF file: `tensors` are those of `found` to write, `dtype` one of
    KINDS, or None to keep what is stored.

    Memory holds the largest tensor of the file. VicugnaError for what GGUF cannot represent.
    """
    gguf, config = ggml.package(), found.config
    factors, wanted = keys.rope_factors(config), ggml.KINDS.get(dtype or "")
    planned = targets(config, tensors)
    kinds = {target.name: _kind(target, wanted, config) for target in planned}
    described = _keys(found, kinds["token_embd.weight"] if wanted is None else wanted)
    with closing(gguf.GGUFWriter(path, ARCHITECTURES[config["model_type"]])) as writer:
        for key, value in described.items():
            writer.add_key_value(key, value, gguf.GGUFValueType(ggml.KEY_TYPES[type(value)]))
        if factors is not None:
            writer.add_tensor_info(FREQUENCIES, factors.shape, np.dtype("f4"), factors.nbytes)
        for target in planned:
            values, size = gguf.GGML_QUANT_SIZES[kinds[target.name]]
            writer.add_tensor_info(target.name, target.shape, np.dtype("f4"),
                                   math.prod(target.shape) // values * size,
                                   gguf.GGMLQuantizationType(kinds[target.name]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for target in planned:
            writer.write_tensor_data(_data(target, kinds[target.name], conversion))


def _data(target: Target, kind: int, conversion: Conversion) -> np.ndarray:
    """The bytes of a tensor of a file. Matrices of a stack are turned into its GGML type one by
    one: together they would take several times their memory."""
    whole = None
    for n, source in enumerate(target.sources):
        part = target.part(conversion.read(source))
        blocks = part.unbind() if part.dim() == 3 else (part,)
        for m, block in enumerate(blocks):
            single = torch.float32 if block.dtype == torch.float64 else block.dtype
            values = conversion.cast(block, ggml.DTYPES.get(kind, single), source.name,
                                     f"[{m}]" if part.dim() == 3 else "")
            rows = ggml.encode(values, kind, conversion.drop_pages)
            if len(target.sources) == len(blocks) == 1:
                return rows
            if whole is None:
                whole = np.empty((len(target.sources) * len(blocks), *rows.shape), rows.dtype)
            whole[n * len(blocks) + m] = rows
    assert whole is not None  # there are sources, and no matrices of no rows
    return whole


def _keys(found: Survey, kind: int) -> dict[str, Any]:
    """All keys of the file of a checkpoint whose matrices are mostly of GGML type `kind`."""
    prefix = ARCHITECTURES[found.config["model_type"]]
    described = {f"{prefix}.{key}": value for key, value in
                 keys.hyperparameters(found.config).items()}
    described |= vocabulary.describe(found.tokenizer, found.files, found.config)
    described |= {"general.type": "model", "general.file_type": ggml.FILE_TYPES[kind],
             "general.quantization_version": ggml.package().GGML_QUANT_VERSION,
             "vicugna.config": json.dumps(found.config, ensure_ascii=False, sort_keys=True),
             "vicugna.generation_config": json.dumps(found.generation_config, sort_keys=True)}
    # GGUF has no empty lists.
    return {key: value for key, value in described.items() if value != []}


def _kind(target: Target, wanted: int | None, config: Mapping[str, Any]) -> int:
    """The GGML type of a tensor, as llama.cpp's converter and quantiser choose it. What they give
    Q6_K, which the package cannot write, is ggml.Q8_0 here."""
    name, shape = target.name, target.shape
    if len(shape) < 2 or name.endswith("_norm.weight") or "ffn_gate_inp" in name:
        return ggml.F32
    if wanted is None:
        return ggml.KIND_OF.get(target.sources[0].kind, ggml.F32)
    if wanted in ggml.DTYPES:
        return wanted
    if shape[-1] % 32:  # rows that do not fill blocks
        return ggml.F16
    last = "token_embd.weight" if config.get("tie_word_embeddings") else "output.weight"
    small = config.get("num_local_experts") == 8 and ("attn_k." in name or "attn_v." in name)
    return ggml.Q8_0 if name == last or small else wanted
