"""Meta's params.json, converted to config.json.

The keys are those of Meta's `ModelArgs` (https://github.com/meta-llama/llama-models), the result
that of transformers' converters (convert_llama_weights_to_hf, convert_llama4_weights_to_hf).
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from vicugna.checkpoint.stored import broken, short
from vicugna.errors import VicugnaError

# Keys that mean another architecture, or weights in another form.
UNSUPPORTED = {"quantization_args": "it is quantised", "lora_args": "it has LoRA adapters",
           "vision_num_cross_attention_layers": "it is a Llama 3.2 with images",
           "vision_chunk_size": "it is a Llama 3.2 with images", "vision_model": "it has images",
           "sliding_window": "it is not a Llama", "moe": "it is not a Llama"}
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
Whole = Annotated[int, Field(gt=0, lt=2**31)]
Real = Annotated[float, Field(gt=0, lt=1e12)]


class Checked(BaseModel, strict=True, allow_inf_nan=False, frozen=True):
    """Values of exactly these types. Other keys are ignored, as Meta's own code does."""


class Experts(Checked):
    num_experts: Whole
    top_k: Whole = 1
    interleave_moe_layer_step: Whole = 1
    capacity_factor: Real = 1.0
    auto_scale_F: bool = True


class Size(Checked):
    height: Whole
    width: Whole


class Vision(Checked):
    image_size: Size
    patch_size: Size
    dim: Whole
    n_layers: Whole
    n_heads: Whole
    mlp_ratio: Real
    output_dim: Whole
    pixel_shuffle_ratio: Real


class Params(Checked):
    """params.json, with the converters' defaults."""

    dim: Whole
    n_layers: Whole
    n_heads: Whole
    norm_eps: Real
    n_kv_heads: Whole | None = None
    head_dim: Whole | None = None
    vocab_size: int | None = None  # -1 in Llama 1 and 2
    multiple_of: Whole = 256
    ffn_dim_multiplier: Real | None = None
    ffn_exp: Real = 4.0
    rope_theta: Real = 10000.0
    use_scaled_rope: bool = False
    rope_scaling_factor: Real | None = None
    rope_high_freq_factor: Real | None = None
    nope_layer_interval: Whole | None = None
    attention_chunk_size: Whole | None = None
    use_qk_norm: bool = False
    attn_temperature_tuning: bool = True
    floor_scale: Real = 8192.0
    attn_scale: Real = 0.1
    moe_args: Experts | None = None
    vision_args: Vision | None = None

    @property
    def head_width(self) -> int:
        return self.dim // self.n_heads

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_heads or self.n_heads

    @property
    def is_llama3(self) -> bool:
        """Whether it is a Llama 3 or later."""
        return self.use_scaled_rope or self.rope_theta == 500_000

    def ffn_width(self, shrink: float = 1.0) -> int:
        """Hidden width of a feed-forward layer: 2/3 of `ffn_exp` widths, divided by `shrink` for an
        expert, up to a multiple of `multiple_of`."""
        width = int(2 * int(self.ffn_exp * self.dim) / 3)
        width = int(int((self.ffn_dim_multiplier or 1) * width) / shrink)
        return -(-width // self.multiple_of) * self.multiple_of


def parse(values: dict[str, Any], path: Path) -> Params:
    """The content of params.json at `path`. VicugnaError for missing keys, wrong types, and
    models of another kind."""
    if isinstance(values.get("model"), dict):
        values = values["model"]
    for key, what in UNSUPPORTED.items():
        if values.get(key) not in (None, False, 0, -1):
            raise VicugnaError(f"{key}: {what}, which is not read in Meta's form", str(path),
                               "Use its Hugging Face folder")
    try:
        params = Params.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        what = f"missing {key}" if first["type"] == "missing" else f"{key}: {first['msg']}"
        raise broken(short(what), path) from None
    if params.dim % params.n_heads or params.head_dim not in (None, params.head_width):
        raise broken(f"dim {params.dim} is not n_heads {params.n_heads} times a head's width", path)
    if params.head_width % 2:
        raise broken(f"a head's width, {params.head_width}, is odd", path)
    if (vision := params.vision_args) and (vision.image_size.height, vision.patch_size.height) != (
            vision.image_size.width, vision.patch_size.width):
        raise VicugnaError("vision_args: images or patches that are not square", str(path),
                           "Only square ones are read")
    return params


def llama(p: Params, vocabulary: int, tied: bool, instruct: bool
          ) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json of a Llama 1 to 3.3.

    params.json does not name its version. Llama 3's theta is 500,000; scaled RoPE came with 3.1,
    tied embeddings and a greater factor with 3.2; Llama 1 has a smaller epsilon, but for its 65B,
    whose heads are not grouped as those of the 70B.
    """
    first = p.norm_eps < 1e-5 or (p.dim == 8192 and p.n_kv_heads is None)
    context = (131072 if p.use_scaled_rope else 8192 if p.is_llama3
               else 16384 if p.rope_theta > 10000  # Code Llama
               else 2048 if first else 4096)
    ends = [128001, 128008, 128009] if instruct else 128001
    ids = _ids(vocabulary, 128000, ends) if p.is_llama3 else _ids(vocabulary, 1, 2)
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        **_shape(p, vocabulary), "intermediate_size": p.ffn_width(),
        "max_position_embeddings": context,
        "rope_scaling": _scaling(p, 32.0 if tied else 8.0, 4.0), "tie_word_embeddings": tied, **ids
    }, SAMPLING | ids


def llama4(p: Params, vocabulary: int, tied: bool, instruct: bool
           ) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json of a Llama 4.

    The numbers of Scout's RoPE scaling are not in its params.json, but in Meta's code
    (models/llama4/args.py); those of the context are in neither.
    """
    experts, every, layers = p.moe_args, p.nope_layer_interval, range(1, p.n_layers + 1)
    context = 2**18 if not instruct else 8192 if experts is None else (
        10 * 2**20 if experts.num_experts == 16 else 2**20)
    ends = [200001, 200007, 200008] if instruct else 200001
    ids = _ids(vocabulary, 200000, ends, 200018)
    text = {
        "model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"], "hidden_act": "silu",
        **_shape(p, vocabulary), "intermediate_size_mlp": p.ffn_width(),
        "max_position_embeddings": context, "rope_scaling": _scaling(p, 16.0, 1.0),
        "use_qk_norm": p.use_qk_norm, "attn_temperature_tuning": p.attn_temperature_tuning,
        "floor_scale": int(p.floor_scale), "attn_scale": p.attn_scale,
        "no_rope_layers": [int(every is None or n % every > 0) for n in layers],
        "attention_chunk_size": p.attention_chunk_size, "tie_word_embeddings": tied, **ids}
    if p.attention_chunk_size is None:
        text["layer_types"] = ["full_attention" for _ in layers]
    if experts is None:
        text["moe_layers"] = []
    else:
        shrink = experts.capacity_factor + 1 if experts.auto_scale_F else 1.0
        text |= {"num_local_experts": experts.num_experts, "num_experts_per_tok": experts.top_k,
                 "interleave_moe_layer_step": experts.interleave_moe_layer_step,
                 "intermediate_size": p.ffn_width(shrink)}
    generation = (SAMPLING if instruct else {}) | ids
    if p.vision_args is None:
        return text, generation
    return {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"],
            "text_config": text, "vision_config": _vision(p.vision_args), **ids,
            "tie_word_embeddings": tied, "image_token_index": 200092, "boi_token_index": 200080,
            "eoi_token_index": 200081}, generation


def _vision(v: Vision) -> dict[str, Any]:
    return {"model_type": "llama4_vision_model", "hidden_act": "gelu", "hidden_size": v.dim,
            "num_hidden_layers": v.n_layers, "num_attention_heads": v.n_heads,
            "image_size": v.image_size.height, "patch_size": v.patch_size.height,
            "intermediate_size": int(v.mlp_ratio * v.dim),
            "pixel_shuffle_ratio": v.pixel_shuffle_ratio, "vision_output_dim": v.output_dim,
            "projector_input_dim": v.output_dim, "projector_output_dim": v.output_dim}


def _shape(p: Params, vocabulary: int) -> dict[str, Any]:
    return {"vocab_size": vocabulary, "hidden_size": p.dim, "num_hidden_layers": p.n_layers,
            "num_attention_heads": p.n_heads, "num_key_value_heads": p.groups,
            "head_dim": p.head_width, "rms_norm_eps": p.norm_eps, "rope_theta": p.rope_theta}


def _scaling(p: Params, factor: float, high: float) -> dict[str, Any] | None:
    return {"rope_type": "llama3", "factor": p.rope_scaling_factor or factor,
            "low_freq_factor": 1.0, "high_freq_factor": p.rope_high_freq_factor or high,
            "original_max_position_embeddings": 8192} if p.use_scaled_rope else None


def _ids(vocabulary: int, begin: int, ends: int | list[int], pad: int = 2**31) -> dict[str, Any]:
    """The ids of special tokens, if the vocabulary has them: one may have been cut."""
    ids = {"bos_token_id": (begin, begin), "pad_token_id": (pad, pad),
           "eos_token_id": (ends, max(ends) if isinstance(ends, list) else ends)}
    return {key: value for key, (value, last) in ids.items() if last < vocabulary}
