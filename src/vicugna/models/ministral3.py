"""Ministral 3: a Mistral with YaRN, and a query temperature that grows with the position.

Parameter names are those of Hugging Face's Ministral3ForCausalLM; as published, it is the text
model of a mistral3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from vicugna.errors import config_error
from vicugna.models import llama, mistral
from vicugna.models.layers import decoder, rope
from vicugna.models.layers.mlp import SwiGLU

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0,
        "original_max_position_embeddings": 16384, "beta_fast": 32.0, "beta_slow": 1.0,
        "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}


@dataclass(frozen=True)
class Config(mistral.Config):
    """The keys of a Ministral 3's config.json, with Hugging Face's defaults; `rope_scaling` has
    `llama_4_scaling_beta` too."""

    model_type: str = "ministral3"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """As `Shape.from_dict`."""
        given = {key: value for key, value in values.items() if value is not None}
        if not given.keys() & {"rope_parameters", "rope_scaling"}:
            given["rope_parameters"] = YARN
        return super().from_dict({
            "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 262144, "sliding_window": None, **given})

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("llama_4_scaling_beta", rope.ORIGINAL):
            value = (self.rope_scaling or {}).get(key)
            if not isinstance(value, int | float) or value <= 0:
                raise config_error(f"{key} of rope_parameters is {value!r}",
                                   "Ministral 3 needs YaRN with this key")


class Attention(llama.Attention):
    """Queries are scaled by 1 + beta * log(1 + floor(position / original)), `original` being the
    context before YaRN (arXiv 2501.19399, as in Llama 4)."""

    def __init__(self, config: mistral.Config, layer: int) -> None:
        super().__init__(config, layer, config.spans()[layer])
        self.scaling = config.rope_scaling or {}

    def embed_positions(self, q_BTHK: Tensor, k_BTGK: Tensor, positions_BT: Tensor,
                        rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        beta, original = self.scaling["llama_4_scaling_beta"], self.scaling[rope.ORIGINAL]
        scale_BT = 1 + beta * torch.log1p(torch.floor(positions_BT / original))
        q, k = super().embed_positions(q_BTHK, k_BTGK, positions_BT, rotation)
        return q * scale_BT[:, :, None, None].to(q.dtype), k


class Network(decoder.Network):
    @staticmethod
    def layer(config: mistral.Config, n: int) -> llama.Layer:
        return llama.Layer(config, Attention(config, n),
                           SwiGLU(config.hidden_size, config.intermediate_size))
