"""config.json and GGUF's keys for hyperparameters, each converted to the other.

GGUF has the keys that llama.cpp reads; the rest is fixed in its code (src/models/*.cpp), and a
config that differs is refused.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vicugna import models
from vicugna.checkpoint.gguf.file import unrepresentable
from vicugna.checkpoint.stored import broken, short
from vicugna.errors import VicugnaError, config_error
from vicugna.models.layers import rope
from vicugna.models.layers.mask import Span

# model_type -> llama.cpp's architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2",
                 "llama4_text": "llama4", "deepseek_v3": "deepseek2"}
# config.json's keys, and GGUF's after the name of the architecture.
SHAPE = {"vocab_size": "vocab_size", "max_position_embeddings": "context_length",
         "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
         "num_attention_heads": "attention.head_count",
         "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
         "num_experts_per_tok": "expert_used_count"}
HEADS = {"num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
         "num_local_experts": "expert_count"}
LLAMA = SHAPE | HEADS | {"intermediate_size": "feed_forward_length"}
FIELDS = {
    "llama": LLAMA, "qwen2": LLAMA,
    "llama4": SHAPE | HEADS | {
        "intermediate_size_mlp": "feed_forward_length",
        "intermediate_size": "expert_feed_forward_length",
        "interleave_moe_layer_step": "interleave_moe_layer_step"},
    "deepseek2": SHAPE | {
        "intermediate_size": "feed_forward_length",
        "moe_intermediate_size": "expert_feed_forward_length", "n_routed_experts": "expert_count",
        "n_shared_experts": "expert_shared_count", "n_group": "expert_group_count",
        "topk_group": "expert_group_used_count", "norm_topk_prob": "expert_weights_norm",
        "routed_scaling_factor": "expert_weights_scale",
        "first_k_dense_replace": "leading_dense_block_count",
        "q_lora_rank": "attention.q_lora_rank", "kv_lora_rank": "attention.kv_lora_rank",
        "qk_rope_head_dim": "rope.dimension_count", "v_head_dim": "attention.value_length_mla"}}
HEAD_DIMS = ("attention.value_length", "rope.dimension_count")  # equal to the key length
# Of DeepSeek, whose heads share one latent: GGUF's key length is the latent's.
LATENT = ("attention.head_count_kv", "attention.key_length", "attention.value_length",
          "attention.key_length_mla", "expert_gating_func")
SIGMOID = 2  # gguf.ExpertGatingFuncType
SCALING = {"rope_type": "rope.scaling.type", "factor": "rope.scaling.factor",
           "original_max_position_embeddings": "rope.scaling.original_context_length"}
BETAS = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
YARN_LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"  # of DeepSeek: a tenth of mscale_all_dim
HARMLESS = {"tensor_data_layout", "rope.scaling.finetuned", *BETAS.values()}
# What llama.cpp takes where a key is absent or zero; other keys must be there.
DEFAULTS = {"rope_theta": 10000.0, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1,
          "norm_topk_prob": False, "routed_scaling_factor": 1.0, "q_lora_rank": None}
OPTIONAL = {"vocab_size", "num_key_value_heads", "head_dim"}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
HIGH = (4.0, 1.0)  # high_freq_factor of Llama 3.1, and of Llama 4
# llama.cpp's Llama 4: chunks of RoPE's layers, every fourth layer without RoPE, whose queries grow
# with the position; and the only number of experts (Maverick's) with which QK norm is off.
CHUNK, WITHOUT_ROPE, FLOOR_SCALE, ATTN_SCALE, NO_NORM = 8192, 4, 8192, 0.1, 128
LATENT_EPS = 1e-6  # of DeepSeek's norms of latents; llama.cpp has one for all norms
LITE = (26, 27)  # layers by which llama.cpp knows DeepSeek's Lite, which has no q_lora_rank
LITE_48 = (48, 128256)  # layers and vocabulary of another one


def parsed(config: Mapping[str, Any]) -> Any:
    """The Config of a config.json, of an architecture that GGUF has; else VicugnaError."""
    kind = config.get("model_type")
    module = models.architecture(kind)
    if kind == "vicugna":
        raise config_error("our own architecture cannot be represented in GGUF, since llama.cpp "
                           "does not compute it", "Serve it with vicugna")
    if kind not in ARCHITECTURES:
        raise config_error(f"model_type {kind!r} is not written as GGUF",
                           f"Only {', '.join(ARCHITECTURES)} are; convert to a Hugging Face folder")
    return module.Config.from_dict(config)


def hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """GGUF's keys for a config.json, after the architecture's name.

    VicugnaError for what GGUF has no keys for, or llama.cpp would compute otherwise whatever the
    text is.
    """
    shape, architecture = parsed(config), ARCHITECTURES[config["model_type"]]
    found = {field: getattr(shape, key) for key, field in FIELDS[architecture].items()
             if hasattr(shape, key)}
    if architecture == "deepseek2":
        found |= _deepseek2(shape)
    else:
        found |= dict.fromkeys(HEAD_DIMS, shape.head_dim)
    if architecture == "llama4":
        found |= _llama4(shape)
    return found | _scaling(shape, architecture)


def _llama4(shape: Any) -> dict[str, Any]:
    """The keys that are not fields, for a Llama 4 that llama.cpp computes."""
    layers = range(shape.num_hidden_layers)
    if shape.attention_bias:
        raise unrepresentable("attention_bias")
    if any(shape.has_rope(n) != ((n + 1) % WITHOUT_ROPE != 0) for n in layers):
        raise unrepresentable(f"RoPE in other layers than all but every {WITHOUT_ROPE}th")
    if shape.use_qk_norm != (shape.num_local_experts != NO_NORM):
        raise unrepresentable(f"use_qk_norm {shape.use_qk_norm} with {shape.num_local_experts} "
                           "experts")
    mixtures = [shape.has_experts(n) for n in layers]
    step = [*mixtures, True].index(True) + 1
    if mixtures != [(n + 1) % step == 0 for n in layers]:
        raise unrepresentable("experts in other layers than every nth")
    return {"interleave_moe_layer_step": step}


def _deepseek2(shape: Any) -> dict[str, Any]:
    """The keys that are not fields, for a DeepSeek that llama.cpp computes."""
    layers, rank = shape.num_hidden_layers, shape.q_lora_rank
    if shape.attention_bias:
        raise unrepresentable("attention_bias")
    if shape.n_shared_experts == 0 or shape.routed_scaling_factor == 0:
        raise unrepresentable("n_shared_experts or routed_scaling_factor of 0")
    if rank is not None and (layers in LITE or (layers, shape.vocab_size) == LITE_48):
        raise unrepresentable(f"q_lora_rank in {layers} layers, by which llama.cpp knows a Lite "
                           "model,")
    R, P = shape.kv_lora_rank, shape.qk_rope_head_dim
    all_groups = shape.topk_group == shape.n_group  # llama.cpp wants one then
    return {"attention.q_lora_rank": rank or 0, **dict(zip(LATENT, (
        1, R + P, R, shape.qk_nope_head_dim + P, SIGMOID), strict=True))} | (
            {"expert_group_count": 1, "expert_group_used_count": 1} if all_groups else {})


def _scaling(shape: Any, architecture: str) -> dict[str, Any]:
    """The keys of RoPE's scaling."""
    scaling = dict(shape.rope_scaling or {})
    kind = rope.kind_of(scaling)
    # llama.cpp knows Llama 3's kind by a tensor, which not every architecture has; DeepSeek's
    # scores would grow with a linear factor too.
    known = {"llama": ("linear", "yarn", "llama3"), "llama4": ("linear", "yarn", "llama3"),
             "qwen2": ("linear", "yarn"), "deepseek2": ("yarn",)}[architecture]
    if kind not in ("default", *known):
        raise unrepresentable(f"rope_scaling {kind}")
    if kind not in ("linear", "yarn"):
        return {}
    plain: dict[str, Any] = {"rope_type": kind, "factor": float(scaling["factor"])}
    if scaling.get(rope.ORIGINAL) is not None:
        plain[rope.ORIGINAL] = int(scaling[rope.ORIGINAL])
    found = {SCALING[key]: value for key, value in plain.items()}
    if architecture == "deepseek2":  # features are not stretched, and scores as mscale_all_dim says
        weight = float(scaling.get("mscale_all_dim") or 0)
        plain |= {"mscale": weight, "mscale_all_dim": weight}
        found[YARN_LOG_MULTIPLIER] = 0.1 * weight
        if weight <= 0 or plain["factor"] < 1:
            raise unrepresentable("yarn without mscale_all_dim, or of a factor below 1,")
    if rope.attention_factor(plain) != rope.attention_factor(scaling) or not torch.equal(
            *(rope.inverse_frequencies(shape.head_dim, shape.rope_theta, x)
              for x in (plain, scaling))):
        raise unrepresentable("rope_scaling yarn of unusual settings")
    return found


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """What llama.cpp divides RoPE's frequencies by, float32 [K/2], if scaled as Llama 3's are."""
    shape = parsed(config)
    if rope.kind_of(shape.rope_scaling or {}) != "llama3":
        return None
    plain, scaled = (rope.inverse_frequencies(shape.head_dim, shape.rope_theta, x)
                     for x in (None, shape.rope_scaling))
    return plain / scaled


def lost(config: Mapping[str, Any]) -> list[str]:
    """Where llama.cpp's computation differs from this config.json's, or is missing."""
    if config.get("model_type") == "llama4":
        return ["the vision encoder: images are left out", *lost(text_config(config))]
    shape, architecture = parsed(config), ARCHITECTURES[config["model_type"]]
    if architecture == "llama4":
        return _lost_llama4(shape)
    if architecture == "deepseek2":
        return [] if shape.rms_norm_eps == LATENT_EPS else [
            f"the epsilon {LATENT_EPS} of norms of latents: llama.cpp takes rms_norm_eps"]
    spans = (shape.spans() if hasattr(shape, "spans")
             else [Span(getattr(shape, "sliding_window", None))])
    windows = {span.window for span in spans if span.window is not None
               and span.window < shape.context_length}
    return [f"the sliding window of {window:,} tokens: llama.cpp lets every token see all before it"
            for window in sorted(windows)]


def _lost_llama4(shape: Any) -> list[str]:
    """Where long texts meet other chunks or other queries than the config's."""
    T, layers = shape.context_length, range(shape.num_hidden_layers)
    chunks = [(shape.span(n).chunk or T, CHUNK if shape.has_rope(n) else T) for n in layers]
    found = [f"which tokens a layer sees: llama.cpp has chunks of {CHUNK:,} in layers with RoPE "
             "and none in others"] if any(min(a, T) != min(b, T) for a, b in chunks) else []
    tuned = shape.attn_temperature_tuning and shape.attn_scale != 0 and shape.floor_scale <= T
    ours = (shape.floor_scale, shape.attn_scale) if tuned else None
    theirs = (FLOOR_SCALE, ATTN_SCALE) if T >= FLOOR_SCALE else None
    if ours != theirs and not all(map(shape.has_rope, layers)):
        found.append(f"the query temperature scale: llama.cpp has floor_scale {FLOOR_SCALE} "
                     f"and attn_scale {ATTN_SCALE}")
    return found


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the text model in a `llama4`, which has a vision encoder too."""
    tokens = {key: value for key, value in config.items() if key.endswith("_token_id")}
    return tokens | dict(config.get("text_config") or {}) | {
        "model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}


def foreign_config(architecture: str, found: Mapping[str, Any], factors: Tensor | None,
                   tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """config.json of a file that somebody else wrote: `found` are its keys after the name of the
    architecture, `factors` what divides RoPE's frequencies, `tensors` the shapes of all tensors.

    VicugnaError for keys that are unknown, missing or of another model than any config's.
    """
    fields = FIELDS[architecture]
    known = {*fields.values(), *SCALING.values(), *HARMLESS, *(
        (*LATENT, YARN_LOG_MULTIPLIER) if architecture == "deepseek2" else HEAD_DIMS)}
    if strange := sorted(found.keys() - known):
        raise VicugnaError(f"key {architecture}.{short(strange[0])} is not known", "",
                           "It may change what the model computes: use its Hugging Face folder")
    config = {key: found[field] for key, field in fields.items() if found.get(field)}
    config |= {key: DEFAULTS[key] for key in fields if key in DEFAULTS and key not in config}
    experts = "num_local_experts" in config
    lacks = OPTIONAL | ({"num_local_experts", "num_experts_per_tok"}
                        if fields is LLAMA and not experts else set())
    if missing := sorted(fields[key] for key in fields.keys() - config.keys() - lacks):
        raise broken(f"key {architecture}.{missing[0]} is missing", "")
    config.setdefault("vocab_size", tensors["token_embd.weight"][0])
    config["tie_word_embeddings"] = "output.weight" not in tensors
    config["model_type"] = {"llama4": "llama4_text", "deepseek2": "deepseek_v3"}.get(
        architecture, "mixtral" if experts and architecture == "llama" else architecture)
    heads = config["num_attention_heads"]
    if architecture == "deepseek2":
        content = found.get("attention.key_length_mla", 0) - config["qk_rope_head_dim"]
        config |= {"num_key_value_heads": heads, "qk_nope_head_dim": content,
                   "num_nextn_predict_layers": 0}
    else:
        config.setdefault("num_key_value_heads", heads)
        config.setdefault("head_dim", config["hidden_size"] // heads)
    if architecture == "llama4":
        config["use_qk_norm"] = config["num_local_experts"] != NO_NORM
    if config["model_type"] == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    scaling = {key: found[field] for key, field in (SCALING | BETAS).items() if field in found}
    if scaled := scaling.setdefault("rope_type", "linear" if "factor" in scaling else "none"
                                    ) != "none":
        if YARN_LOG_MULTIPLIER in found:
            weight = round(10 * found[YARN_LOG_MULTIPLIER], 6)
            scaling |= {"mscale": weight, "mscale_all_dim": weight}
        config["rope_scaling"] = scaling
    if factors is not None and not bool((factors == 1).all()):
        likely = (LLAMA3 | {"factor": float(factors.max()), "high_freq_factor": x} for x in HIGH)
        config["rope_scaling"] = next((scaling for scaling in likely if agree(rope_factors(
            config | {"rope_scaling": scaling}), factors)), None)
        if config["rope_scaling"] is None:
            raise VicugnaError("rope_freqs.weight is not of Llama 3's kind", "",
                               "Use the Hugging Face folder of this model")
    whole = parsed(config).to_dict()
    expected = {key: one(value) for key, value in hyperparameters(whole).items()}
    unused = set() if scaled else {YARN_LOG_MULTIPLIER, *SCALING.values()}
    for field in found.keys() - HARMLESS - unused:
        if found[field] and found[field] != expected.get(field):
            raise VicugnaError(f"{architecture}.{field} is {short(str(found[field]))}, not "
                               f"{expected.get(field)} as the other keys want", "",
                               "Such a model is not read from GGUF: use its Hugging Face folder")
    return whole


def agree(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two models divide RoPE's frequencies by the same."""
    return a is b if a is None or b is None else a.shape == b.shape and torch.allclose(a, b, 1e-4)


def one(value: Any) -> Any:
    """A value; of an array (one for each layer) the only one; floats as their shortest decimal."""
    if isinstance(value, np.ndarray):
        if len(different := np.unique(value)) != 1:
            raise ValueError("its layers are of different shapes")
        value = different[0].item()
    return float(str(np.float32(value))) if isinstance(value, float) else value
