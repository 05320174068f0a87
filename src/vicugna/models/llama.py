"""Llama 1 to 3.2: pre-norm transformer with RoPE, grouped queries and SwiGLU.

Touvron et al., arXiv 2302.13971 and 2307.09288; Llama Team, arXiv 2407.21783. Parameter names are
those of Hugging Face's LlamaForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from vicugna.models.layers import rope
from vicugna.models.layers.attention import Attend, Span
from vicugna.models.layers.config import check_attention, from_mapping, rope_keys
from vicugna.models.layers.mlp import SwiGLU
from vicugna.models.layers.norm import RMSNorm


@dataclass(frozen=True)
class Config:
    """The keys of a Llama's config.json, with Hugging Face's defaults."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Read config.json's mapping; VicugnaError for missing keys and impossible shapes."""
        return from_mapping(cls, {**values, **rope_keys(values)})

    def __post_init__(self) -> None:
        check_attention(self)
        rope.inverse_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)

    def to_dict(self) -> dict[str, Any]:
        """config.json's content."""
        return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
                **asdict(self)}


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.H, self.G, self.K = (config.num_attention_heads, config.num_key_value_heads,
                                  config.head_dim)
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

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotation, attend)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        c = self.config
        x_BTD = self.embed_tokens(tokens_BT)
        inverse = rope.inverse_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        rotation = rope.rotation(positions_BT, inverse, x_BTD.dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotation, attend)
        return self.norm(x_BTD)


class Network(nn.Module):
    """`hidden_BTD = network(tokens_BT, positions_BT, attend)`; `network.lm_head(hidden_BTD)`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        """Token ids and positions [B, T] (int64) -> hidden states after the last norm [B, T, D]."""
        return self.model(tokens_BT, positions_BT, attend)
