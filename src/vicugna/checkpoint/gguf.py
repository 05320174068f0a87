"""GGUF, llama.cpp's file of weights, hyperparameters and tokenizer in one: read and written.

Quantisation and writing are those of the package `gguf` (the extra `gguf`); what tensors keep their
precision follows llama.cpp's converter and quantiser.

What we write carries config.json and the tokenizer's files as keys of their own (`vicugna.*`,
`tokenizer.huggingface.json`), which llama.cpp skips: reading it gives the same model back. That
config is believed only if it says what GGUF's own keys say.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vicugna import models
from vicugna.checkpoint import gguf_vocabulary
from vicugna.checkpoint.directory import Survey, default_generation_config
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
    decode,
    encode,
    package,
    scan,
)
from vicugna.checkpoint.weights import Stored, broken, short
from vicugna.errors import VicugnaError
from vicugna.models.layers import rope
from vicugna.models.layers.attention import Span

# model_type -> llama.cpp's architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2"}
EXPERTS = 2**12
KINDS = {"float32": F32, "float16": F16, "bfloat16": BF16, "q8_0": Q8_0, "q4_0": Q4_0}
FILE_TYPES = {F32: 0, F16: 1, Q4_0: 2, Q8_0: 7, BF16: 32}  # llama.h: llama_ftype
STORED = {dtype: kind for kind, dtype in DTYPES.items()}
# config.json's keys, and GGUF's after the name of the architecture.
FIELDS = {"vocab_size": "vocab_size", "max_position_embeddings": "context_length",
          "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
          "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count",
          "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
          "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
          "num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
HEAD_DIMS = ("attention.value_length", "rope.dimension_count")  # equal to the key length
SCALING = {"rope_type": "rope.scaling.type", "factor": "rope.scaling.factor",
           "original_max_position_embeddings": "rope.scaling.original_context_length"}
HARMLESS = {"tensor_data_layout", "rope.scaling.finetuned"}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
# GGUF's names of tensors, and those in a Hugging Face folder; * is the expert's number.
OUTSIDE = ("token_embd", "output_norm", "output")  # of the layers
TENSOR_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
    "ffn_down_exps": "block_sparse_moe.experts.*.w2",
    "ffn_up_exps": "block_sparse_moe.experts.*.w3"}
OUR_NAMES = {ours: theirs for theirs, ours in TENSOR_NAMES.items()}
KEY_TYPES = {bool: BOOL, int: UINT32, float: FLOAT32, str: STRING, list: ARRAY}
FREQUENCIES = "rope_freqs.weight"  # what llama.cpp divides RoPE's frequencies by


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
    found = {key.removeprefix(f"{architecture}."): _one(value) for key, value in metadata.items()
             if key.startswith(f"{architecture}.")}
    factors = decode(entries[FREQUENCIES]) if FREQUENCIES in entries else None
    written = json.loads(metadata.get("vicugna.config", "null"))
    for layers in (found.get("block_count"), written and written.get("num_hidden_layers")):
        if type(layers) is int and layers > len(entries):  # or lists of them might fill memory
            raise broken(f"it has {layers:,} layers, but only {len(entries):,} tensors", "")
    if written is not None:
        try:
            said = {key: _one(value) for key, value in hyperparameters(written).items()}
            if said == found and _agree(rope_factors(written), factors):
                return written
        except VicugnaError:
            pass
    return _foreign_config(architecture, found, factors, entries)


def _foreign_config(architecture: str, found: dict[str, Any], factors: Tensor | None,
                    entries: Mapping[str, Entry]) -> dict[str, Any]:
    """config.json of a file that somebody else wrote."""
    known = {*FIELDS.values(), *HEAD_DIMS, *SCALING.values(), *HARMLESS}
    if strange := sorted(found.keys() - known):
        raise VicugnaError(f"key {architecture}.{short(strange[0])} is not known", "",
                           "It may change what the model computes: use its Hugging Face folder")
    config = {key: found[field] for key, field in FIELDS.items() if found.get(field)}
    experts = "num_local_experts" in config
    config["model_type"] = "mixtral" if experts and architecture == "llama" else architecture
    config.setdefault("vocab_size", entries["token_embd.weight"].shape[0])
    width = config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    for key in HEAD_DIMS:
        if found.get(key, width) != width:
            raise VicugnaError(f"{key} is {found[key]}, not the heads' width {width}", "",
                               "Such a model is not read from GGUF: use its Hugging Face folder")
    config.setdefault("rope_theta", 10000.0)
    config["tie_word_embeddings"] = "output.weight" not in entries
    if config["model_type"] == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in entries
        config["mlp_bias"] = "blk.0.ffn_up.bias" in entries
    scaling = {key: found[field] for key, field in SCALING.items() if field in found}
    if scaling.get("rope_type", "none") != "none":
        config["rope_scaling"] = scaling
    if factors is not None and not bool((factors == 1).all()):
        config["rope_scaling"] = LLAMA3 | {"factor": float(factors.max())}
        if not _agree(rope_factors(config), factors):
            raise VicugnaError(f"{FREQUENCIES} is not of Llama 3's kind", "",
                               "Use the Hugging Face folder of this model")
    return _parsed(config).to_dict()


def _agree(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else a.shape == b.shape and torch.allclose(a, b, 1e-4)


def _one(value: Any) -> Any:
    """A value; of an array (one for each layer) the only one; floats as their shortest decimal."""
    if isinstance(value, np.ndarray):
        if len(different := np.unique(value)) != 1:
            raise ValueError("its layers are of different shapes")
        value = different[0].item()
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _tensors(config: Mapping[str, Any], entries: Mapping[str, Entry], path: Path
             ) -> dict[str, Stored]:
    """The tensors by their Hugging Face names. Norms and biases, which are F32 in every file, take
    the dtype of the matrices where it holds them exactly."""
    kinds = {entry.kind for entry in entries.values() if len(entry.shape) > 1} - {F32}
    narrow = DTYPES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32
    heads = _heads(config)
    found = {}
    for stored, entry in entries.items():
        if stored == FREQUENCIES:
            continue
        name = _our_name(stored)
        parts: Iterable[int | None] = range(entry.shape[0]) if "*" in name else [None]
        if "*" in name and entry.shape[0] > EXPERTS:
            raise broken(f"{entry.shape[0]:,} experts", f"tensor {short(stored)}")
        for expert in parts:
            ours, turn = name.replace("*", str(expert)), heads.get(name.split(".")[-2], 0)
            kept = dtype = DTYPES.get(entry.kind, torch.float32)
            if dtype != narrow:
                values = decode(entry, expert)
                dtype = narrow if torch.equal(values.to(narrow).to(dtype), values) else dtype
            as_it_lies = entry.kind in DTYPES and dtype == kept and not turn
            shape = entry.shape if expert is None else entry.shape[1:]
            begin = entry.begin + (expert or 0) * math.prod(shape) * dtype.itemsize
            found[ours] = Stored(ours, path, begin, dtype, shape, load=None if as_it_lies else
                                 partial(_load, entry, expert, turn, dtype))
    return found


def _load(entry: Entry, expert: int | None, heads: int, dtype: torch.dtype) -> Tensor:
    tensor = decode(entry, expert).to(dtype)
    return turned(tensor, heads, back=True) if heads else tensor


# What both directions share.

def _our_name(name: str) -> str:
    """The Hugging Face name of a tensor of a file."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)(\.weight|\.bias)", name)
    if not match or (ours := TENSOR_NAMES.get(match[2])) is None or (
            (match[1] is None) != (match[2] in OUTSIDE)):
        raise broken(f"unexpected tensor {short(name)}", "")
    return (f"model.layers.{match[1]}." if match[1] else "") + ours + match[3]


def _their_name(name: str) -> str:
    """GGUF's name of a tensor of a Hugging Face folder."""
    match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*)(\.weight|\.bias)", name)
    theirs = OUR_NAMES.get(re.sub(r"experts\.\d+\.", "experts.*.", match[2])) if match else None
    if not match or theirs is None:
        raise VicugnaError(f"GGUF has no name for tensor {short(name)}", "",
                           "Convert to a Hugging Face folder instead")
    return (f"blk.{match[1]}." if match[1] else "") + theirs + match[3]


def _heads(config: Mapping[str, Any]) -> dict[str, int]:
    """The projections whose rows llama.cpp wants in another order, and their numbers of heads."""
    parsed: Any = _parsed(config)
    return ({"q_proj": parsed.num_attention_heads, "k_proj": parsed.num_key_value_heads}
            if ARCHITECTURES[config["model_type"]] == "llama" else {})


def turned(tensor: Tensor, heads: int, back: bool = False) -> Tensor:
    """The rows of each head, from the two halves that Hugging Face rotates against each other to
    neighbours, as in Meta's files, which llama.cpp keeps for its architecture llama; or `back`."""
    half = tensor.shape[0] // heads // 2
    apart = (heads, half, 2) if back else (heads, 2, half)
    return tensor.reshape(*apart, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _parsed(config: Mapping[str, Any]) -> Any:
    """The Config of a config.json, of an architecture that GGUF has; else VicugnaError."""
    kind = config.get("model_type")
    module = models.architecture(kind)
    if kind == "vicugna":
        raise VicugnaError("our own architecture cannot be represented in GGUF, since llama.cpp "
                           "does not compute it", "config.json", "Serve it with vicugna")
    if kind not in ARCHITECTURES:
        raise VicugnaError(f"model_type {kind!r} is not written as GGUF", "config.json",
                           f"Only {', '.join(ARCHITECTURES)} are; convert to a Hugging Face folder")
    return module.Config.from_dict(config)


def hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """GGUF's keys for a config.json, after the architecture's name.

    VicugnaError for what GGUF has no keys for.
    """
    parsed = _parsed(config)
    found = {field: getattr(parsed, key) for key, field in FIELDS.items() if hasattr(parsed, key)}
    found |= dict.fromkeys(HEAD_DIMS, parsed.head_dim)
    scaling = dict(parsed.rope_scaling or {})
    kind = rope.kind_of(scaling)
    if kind in ("linear", "yarn"):
        plain: dict[str, Any] = {"rope_type": kind, "factor": float(scaling["factor"])}
        if kind == "yarn":
            longest = "original_max_position_embeddings"
            plain[longest] = int(scaling[longest])
        same = rope.attention_factor(plain) == rope.attention_factor(scaling) and torch.equal(
            *(rope.inverse_frequencies(parsed.head_dim, parsed.rope_theta, x)
              for x in (plain, scaling)))
        found |= {SCALING[key]: value for key, value in plain.items()}
        kind = kind if same else "yarn of unusual settings"
    # llama.cpp knows Llama 3's kind by a tensor, which its architecture qwen2 has not.
    known = ("default", "linear", "yarn", *(["llama3"] if _heads(config) else []))
    if kind not in known:
        raise VicugnaError(f"rope_scaling {kind} cannot be represented in GGUF", "config.json",
                           "Convert to a Hugging Face folder instead")
    return found


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """What llama.cpp divides RoPE's frequencies by, float32 [K/2], if scaled as Llama 3's are."""
    parsed = _parsed(config)
    if rope.kind_of(parsed.rope_scaling or {}) != "llama3":
        return None
    plain, scaled = (rope.inverse_frequencies(parsed.head_dim, parsed.rope_theta, x)
                     for x in (None, parsed.rope_scaling))
    return plain / scaled


def lost(config: Mapping[str, Any]) -> list[str]:
    """What llama.cpp would compute otherwise than this config.json says."""
    parsed = _parsed(config)
    spans = (parsed.spans() if hasattr(parsed, "spans")
             else [Span(getattr(parsed, "sliding_window", None))])
    windows = {span.window for span in spans if span.window is not None
               and span.window < parsed.max_position_embeddings}
    return [f"the sliding window of {window:,} tokens: llama.cpp lets every token see all before it"
            for window in sorted(windows)]


# From a checkpoint to a file.

def write(path: Path, found: Survey, tensors: Mapping[str, Stored], dtype: str | None,
          load: Callable[[Stored, torch.dtype], Tensor]) -> None:
    """Write a checkpoint as a GGUF file: `tensors` are those of `found` to write, `dtype` one of
    KINDS, or None to keep what is stored; `load` gives a tensor in a dtype.

    Memory holds the largest tensor of the file. VicugnaError for what GGUF cannot represent.
    """
    gguf, config = package(), found.config
    heads, factors = _heads(config), rope_factors(config)
    groups: dict[str, list[Stored]] = {}
    for name in sorted(tensors, key=_order):
        groups.setdefault(_their_name(name), []).append(tensors[name])
    kinds = {name: _kind(name, parts, KINDS.get(dtype or ""), config)
             for name, parts in groups.items()}
    keys = _keys(found, KINDS[dtype] if dtype else kinds["token_embd.weight"])
    with closing(gguf.GGUFWriter(path, ARCHITECTURES[config["model_type"]])) as writer:
        for key, value in keys.items():
            writer.add_key_value(key, value, gguf.GGUFValueType(KEY_TYPES[type(value)]))
        if factors is not None:
            writer.add_tensor_info(FREQUENCIES, factors.shape, np.dtype("f4"), factors.nbytes)
        for name, parts in groups.items():
            shape = ((len(parts),) if "_exps" in name else ()) + parts[0].shape
            values, size = gguf.GGML_QUANT_SIZES[kinds[name]]
            writer.add_tensor_info(name, shape, np.dtype("f4"), math.prod(shape) // values * size,
                                   gguf.GGMLQuantizationType(kinds[name]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for name, parts in groups.items():
            whole = np.zeros(0)
            for n, part in enumerate(parts):
                tensor = load(part, DTYPES.get(kinds[name], torch.float32))
                turn = heads.get(part.name.split(".")[-2])
                rows = encode(turned(tensor, turn) if turn else tensor, kinds[name])
                if n == 0:
                    whole = np.empty((len(parts), *rows.shape), rows.dtype) if parts[1:] else rows
                if parts[1:]:
                    whole[n] = rows
            writer.write_tensor_data(whole)


def _keys(found: Survey, kind: int) -> dict[str, Any]:
    """All keys of the file of a checkpoint whose matrices are mostly of GGML type `kind`."""
    prefix = ARCHITECTURES[found.config["model_type"]]
    keys = {f"{prefix}.{key}": value for key, value in hyperparameters(found.config).items()}
    keys |= gguf_vocabulary.describe(found.tokenizer, found.files, found.config)
    keys |= {"general.type": "model", "general.file_type": FILE_TYPES[kind],
             "general.quantization_version": package().GGML_QUANT_VERSION,
             "vicugna.config": json.dumps(found.config, ensure_ascii=False, sort_keys=True),
             "vicugna.generation_config": json.dumps(found.generation_config, sort_keys=True)}
    return {key: value for key, value in keys.items() if value != []}  # GGUF has no empty lists


def _order(name: str) -> tuple[Any, ...]:
    """Layers and experts by number, the embeddings first."""
    numbers = [int(number) for number in re.findall(r"\.(\d+)\.", name)]
    return "embed" not in name, not numbers, numbers[:1], _their_name(name), numbers


def _kind(name: str, parts: list[Stored], wanted: int | None, config: Mapping[str, Any]) -> int:
    """The GGML type of a tensor, as llama.cpp's converter and quantiser choose it. What they give
    Q6_K, which the package cannot write, is Q8_0 here."""
    if len(parts[0].shape) < 2 or name.endswith("_norm.weight") or "ffn_gate_inp" in name:
        return F32
    if wanted is None:
        return STORED.get(parts[0].kind, F32)
    if wanted in DTYPES:
        return wanted
    if parts[0].shape[-1] % 32:  # rows that do not fill blocks
        return F16
    last = "token_embd.weight" if config.get("tie_word_embeddings") else "output.weight"
    small = config.get("num_local_experts") == 8 and ("attn_k." in name or "attn_v." in name)
    return Q8_0 if name == last or small else wanted
