"""Llama 4 Scout and Maverick: iRoPE, a mixture of experts with a shared one, and images.

Most layers have RoPE and chunked attention; every fourth has no position embedding (NoPE), attends
to everything, and scales its queries by a temperature that grows with the position (arXiv
2501.19399), so that attention stays peaked over long contexts. Images are fused early: features of
layers/vision.py replace the embeddings of image tokens.
Parameter names are those of Hugging Face's Llama4ForConditionalGeneration, and of Llama4ForCausalLM
(`model_type` "llama4_text"), whose text model is the same.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicugna.errors import VicugnaError, config_error
from vicugna.models import llama
from vicugna.models.layers import decoder, rope
from vicugna.models.layers.attention import Attend
from vicugna.models.layers.config import Shape
from vicugna.models.layers.mask import Span
from vicugna.models.layers.mlp import SwiGLU
from vicugna.models.layers.moe import Experts
from vicugna.models.layers.vision import VisionConfig, VisionModel

CHUNKED, FULL = "chunked_attention", "full_attention"
IMAGE_KEYS = ("image_token_index", "boi_token_index", "eoi_token_index")


@dataclass(frozen=True)
class Config(Shape):
    """The keys of a Llama 4's config.json, with Hugging Face's defaults: those of `text_config`,
    and beside them `vision_config` (None for a text-only model) and the image tokens.

    Lists say of each layer whether it has RoPE (1) or not (0), how it attends, and which layers
    have experts; without them, intervals do. Without an `attention_chunk_size` all attend fully.
    """

    MAY_BE_ZERO = IMAGE_KEYS

    vocab_size: int = 202048
    hidden_size: int = 5120
    intermediate_size: int = 8192  # of an expert
    num_hidden_layers: int = 48
    num_attention_heads: int = 40
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    use_qk_norm: bool = True
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: int = 4
    layer_types: list[str] | None = None
    attention_chunk_size: int | None = 8192
    attn_temperature_tuning: bool = True
    floor_scale: int = 8192
    attn_scale: float = 0.1
    intermediate_size_mlp: int = 16384  # of a layer without experts
    moe_layers: list[int] | None = None
    interleave_moe_layer_step: int = 1
    num_local_experts: int = 16
    num_experts_per_tok: int = 1
    vision_config: VisionConfig | None = None
    image_token_index: int = 200092
    boi_token_index: int = 200080
    eoi_token_index: int = 200081

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """As `Shape.from_dict`, from either form of the file."""
        if values.get("model_type") == "llama4":
            text, vision = (values.get(key) or {} for key in ("text_config", "vision_config"))
            if not isinstance(text, Mapping) or not isinstance(vision, Mapping):
                raise config_error("text_config or vision_config is not a mapping")
            values = {**{key: values[key] for key in IMAGE_KEYS if key in values}, **text,
                      "vision_config": VisionConfig.from_dict(vision)}
        else:
            values = {**values, "vision_config": None}
        # Absent keys have defaults; a null head_dim means hidden_size / num_attention_heads.
        values = {"num_key_value_heads": 8, "head_dim": 128, **values}
        if isinstance(values.get("attn_temperature_tuning"), int):  # 4 in files of the release
            values["attn_temperature_tuning"] = bool(values["attn_temperature_tuning"])
        return super().from_dict(values)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("attention_chunk_size", 1)
        self.check_experts("num_local_experts")
        for name, known in (("no_rope_layers", (0, 1)), ("layer_types", (CHUNKED, FULL))):
            listed, N = getattr(self, name), self.num_hidden_layers
            if listed and (len(listed) < N or any(kind not in known for kind in listed)):
                raise config_error(f"{name} is {listed}", f"It must give each of {N} layers "
                                   f"{known[0]!r} or {known[1]!r}")
        if not all(isinstance(n, int) for n in self.moe_layers or ()):
            raise config_error(f"moe_layers is {self.moe_layers}", "It must be a list of layers")

    def has_rope(self, layer: int) -> bool:
        """Whether `layer` has rotary position embedding."""
        if self.no_rope_layers:
            return bool(self.no_rope_layers[layer])
        return (layer + 1) % self.no_rope_layer_interval != 0

    def span(self, layer: int) -> Span:
        """How `layer` attends: in chunks if it has RoPE, unless layer_types says otherwise."""
        chunked = (self.layer_types[layer] == CHUNKED if self.layer_types
                   else self.has_rope(layer))
        return Span(chunk=self.attention_chunk_size if chunked else None)

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward of `layer` is a mixture of experts."""
        if self.moe_layers is not None:
            return layer in self.moe_layers
        return (layer + 1) % self.interleave_moe_layer_step == 0

    def to_dict(self) -> dict[str, Any]:
        """config.json's content."""
        text = {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"],
                "hidden_act": "silu", **asdict(self)}
        del text["vision_config"]
        images = {key: text.pop(key) for key in IMAGE_KEYS}
        if self.vision_config is None:
            return text
        return {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"],
                "text_config": text, "vision_config": self.vision_config.to_dict(), **images,
                "tie_word_embeddings": self.tie_word_embeddings}


class Attention(llama.Attention):
    def __init__(self, config: Config, layer: int) -> None:
        biases = config.attention_bias, config.attention_bias
        super().__init__(config, layer, config.span(layer), biases)
        self.config, self.has_rope = config, config.has_rope(layer)

    def embed_positions(self, q_BTHK: Tensor, k_BTGK: Tensor, positions_BT: Tensor,
                        rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        q, k, dtype = q_BTHK, k_BTGK, q_BTHK.dtype
        if self.has_rope:
            q, k = rope.rotate_pairs(q, *rotation), rope.rotate_pairs(k, *rotation)
            if self.config.use_qk_norm:
                q, k = (F.rms_norm(x.float(), (self.K,), eps=self.config.rms_norm_eps).to(dtype)
                        for x in (q, k))
        elif self.config.attn_temperature_tuning:
            # 1 up to position floor_scale - 2, then growing with the logarithm of the position, in
            # which padding does not count: a row has the same logits in every batch.
            floors_BT = torch.floor((positions_BT.float() + 1) / self.config.floor_scale)
            scale_BT = torch.log1p(floors_BT) * self.config.attn_scale + 1
            q = (q * scale_BT[:, :, None, None]).to(dtype)
        return q, k


class MoE(nn.Module):
    """A shared expert for every token, and the `top_k` experts with the highest logits, each
    applied to the token times the sigmoid of its logit."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.router = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = Experts(config.hidden_size, config.intermediate_size,
                               config.num_local_experts, transposed=True)
        self.shared_expert = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        logit_Nk, chosen_Nk = self.router(x_ND).topk(self.top_k, dim=-1)
        routed_ND = self.experts(x_ND, chosen_Nk, logit_Nk.float().sigmoid(), weigh_input=True)
        return (self.shared_expert(x_ND) + routed_ND).view_as(x_BTD)


class Text(decoder.Network):
    """The text model: all of a "llama4_text", the `language_model` of a "llama4"."""

    @staticmethod
    def layer(config: Config, n: int) -> llama.Layer:
        feed_forward = MoE(config) if config.has_experts(n) else SwiGLU(
            config.hidden_size, config.intermediate_size_mlp)
        return llama.Layer(config, Attention(config, n), feed_forward, "feed_forward")


class Multimodal(decoder.Multimodal):
    """`hidden_BTD = network(tokens_BT, positions_BT, attend, images)`: text with images in it."""

    def __init__(self, config: Config, vision: VisionConfig) -> None:
        super().__init__(config, Text(config))
        self.vision_model = VisionModel(vision)
        self.multi_modal_projector = nn.ModuleDict({
            "linear_1": nn.Linear(vision.vision_output_dim, config.hidden_size, bias=False)})

    def encode_images(self, images: Tensor) -> Tensor:
        """Pixel values of tiles [N, 3, H, W] -> their features [M, D], in order. VicugnaError for
        tiles of a wrong size."""
        return self.multi_modal_projector["linear_1"](self.vision_model(images).flatten(0, 1))

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor, attend: Attend,
                images: Tensor | None = None, features_MD: Tensor | None = None,
                is_image_BT: Tensor | None = None) -> Tensor:
        """As `decoder.Network`. `images` holds pixel values [tiles, 3, H, W] of all tiles in these
        tokens, row by row; their features, in order, replace the embeddings of the image tokens.
        Chunks of prompts take the `features_MD` of their image tokens instead, with `is_image_BT`
        where only some image tokens stand for one (others have been generated).

        Raises VicugnaError unless there are as many image tokens as features, or for tiles of a
        wrong size. Without either, image tokens keep their own embedding.
        """
        if images is not None:
            features_MD = self.encode_images(images)
        if features_MD is None:
            return super().forward(tokens_BT, positions_BT, attend)
        index = self.config.image_token_index
        if is_image_BT is None:
            is_image_BT = tokens_BT == index
        if (count := int(is_image_BT.sum())) != len(features_MD):
            raise VicugnaError(f"{count} image tokens, but {len(features_MD)} features of tiles",
                               "images", f"Write token {index} once for each feature of a tile")
        decoder_ = self.language_model.model
        x_BTD = decoder_.embed_tokens(tokens_BT)
        x_BTD = x_BTD.masked_scatter(is_image_BT[:, :, None], features_MD.to(x_BTD.dtype))
        return decoder_.from_embeddings(x_BTD, positions_BT, attend)


def Network(config: Config) -> nn.Module:
    """The network of `config`: with a vision encoder if it has a `vision_config`."""
    vision = config.vision_config
    return Text(config) if vision is None else Multimodal(config, vision)
