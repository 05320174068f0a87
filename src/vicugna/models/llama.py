"""Llama 1 to 3.2: pre-norm transformer with RoPE, grouped queries and SwiGLU.

Touvron et al., arXiv 2302.13971 and 2307.09288; Llama Team, arXiv 2407.21783. Parameter names are
those of Hugging Face's LlamaForCausalLM.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from torch import Tensor, nn

from vicugna.models.layers import decoder, rope
from vicugna.models.layers.attention import Attend, Span
from vicugna.models.layers.config import Shape
from vicugna.models.layers.mlp import SwiGLU
from vicugna.models.layers.norm import RMSNorm


@dataclass(frozen=True)
class Config(Shape):
    """The keys of a Llama's config.json, with Hugging Face's defaults."""

    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """As `Shape.from_dict`; transformers 5 nests `rope_theta` and `rope_scaling` in
        `rope_parameters`, earlier releases keep two keys."""
        if isinstance(nested := values.get("rope_parameters"), Mapping):
            scaling = dict(nested)
            theta = scaling.pop("rope_theta", values.get("rope_theta"))
            scaled = scaling.get("rope_type", "default") != "default"
            values = {**values, "rope_theta": theta, "rope_scaling": scaling if scaled else None}
        return super().from_dict(values)

    def __post_init__(self) -> None:
        super().__post_init__()
        rope.inverse_frequencies(2, self.rope_theta, self.rope_scaling)  # checks the scaling

    def to_dict(self) -> dict[str, Any]:
        """config.json's content."""
        return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
                **asdict(self)}


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.H, self.G = config.num_attention_heads, config.num_key_value_heads
        self.K = config.head_dim
        D, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(D, self.H * self.K, bias=bias)
        self.k_proj = nn.Linear(D, self.G * self.K, bias=bias)
        self.v_proj = nn.Linear(D, self.G * self.K, bias=bias)
        self.o_proj = nn.Linear(self.H * self.K, D, bias=bias)

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        B, T, _ = x_BTD.shape
        q = rope.rotate(self.q_proj(x_BTD).view(B, T, self.H, self.K), *rotation)
        k = rope.rotate(self.k_proj(x_BTD).view(B, T, self.G, self.K), *rotation)
        v = self.v_proj(x_BTD).view(B, T, self.G, self.K)
        return self.o_proj(attend(self.layer, q, k, v, Span()).reshape(B, T, self.H * self.K))


class Layer(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, rotation: tuple[Tensor, Tensor],
                attend: Attend) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotation, attend)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Network(decoder.Network):
    layer = Layer
