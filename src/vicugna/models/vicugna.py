"""Vicugna: Llama 4's iRoPE idea, done for long context.

Most layers see a short sliding window through RoPE; a few global layers have no position
embedding, so no position is out of distribution, and scale their queries by the logarithm of the
number of visible keys (SSMax, arXiv 2501.19399), so that attention stays peaked however long the
context. Queries and keys are normalised per head, and a short causal depthwise convolution mixes
neighbouring tokens before attention, which lets one layer match a key and read what follows it
(see docs/log.md). The feed-forward is dense or a mixture of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vicugna.errors import VicugnaError
from vicugna.models.layers import rope
from vicugna.models.layers.attention import Attend, Span
from vicugna.models.layers.config import check_attention, from_mapping
from vicugna.models.layers.conv import CausalConv
from vicugna.models.layers.mlp import SwiGLU
from vicugna.models.layers.moe import MoE
from vicugna.models.layers.norm import RMSNorm


@dataclass(frozen=True)
class Config:
    """The keys of a Vicugna's config.json.

    Layer n is global when n % global_every == global_every - 2 (with 4: the 3rd, 7th, ...).
    num_experts 0 means a dense feed-forward.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 1048576
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    sliding_window: int = 64
    global_every: int = 4
    conv_width: int = 4
    num_experts: int = 0
    num_experts_per_tok: int = 2
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Read config.json's mapping; VicugnaError for missing keys and impossible shapes."""
        return from_mapping(cls, values)

    def __post_init__(self) -> None:
        check_attention(self)
        for name, least in (("sliding_window", 1), ("global_every", 2), ("conv_width", 1),
                            ("num_experts", 0)):
            if getattr(self, name) < least:
                raise VicugnaError(f"{name} is {getattr(self, name)}", "config.json",
                                   f"It must be at least {least}")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise VicugnaError(f"num_experts_per_tok is {self.num_experts_per_tok}", "config.json",
                               f"It must lie between 1 and num_experts ({self.num_experts})")

    def is_global(self, layer: int) -> bool:
        """Whether `layer` sees every earlier position."""
        return layer % self.global_every == self.global_every - 2

    def to_dict(self) -> dict[str, Any]:
        """config.json's content."""
        return {"model_type": "vicugna", "architectures": ["VicugnaForCausalLM"], **asdict(self)}


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.is_global = layer, config.is_global(layer)
        self.span = Span(None if self.is_global else config.sliding_window)
        self.H, self.G, self.K = (config.num_attention_heads, config.num_key_value_heads,
                                  config.head_dim)
        D = config.hidden_size
        self.q_proj = nn.Linear(D, self.H * self.K, bias=False)
        self.k_proj = nn.Linear(D, self.G * self.K, bias=False)
        self.v_proj = nn.Linear(D, self.G * self.K, bias=False)
        self.o_proj = nn.Linear(self.H * self.K, D, bias=False)
        self.q_norm = RMSNorm(self.K, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.K, config.rms_norm_eps)
        if self.is_global:
            self.log_scale = nn.Parameter(torch.empty(self.H))

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, rotation: tuple[Tensor, Tensor],
                attend: Attend) -> Tensor:
        B, T, _ = x_BTD.shape
        q = self.q_norm(self.q_proj(x_BTD).view(B, T, self.H, self.K))
        k = self.k_norm(self.k_proj(x_BTD).view(B, T, self.G, self.K))
        v = self.v_proj(x_BTD).view(B, T, self.G, self.K)
        if self.is_global:
            visible_BT = (positions_BT + 1).float()
            scale = self.log_scale[:, None] * visible_BT.log()[:, :, None, None]
            q = q * scale.to(q.dtype)
        else:
            q, k = rope.rotate(q, *rotation), rope.rotate(k, *rotation)
        return self.o_proj(attend(self.layer, q, k, v, self.span).reshape(B, T, self.H * self.K))


class Layer(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.reach = layer, config.conv_width - 1
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.conv = CausalConv(config.hidden_size, config.conv_width)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: nn.Module = SwiGLU(config.hidden_size, config.intermediate_size)
        if config.num_experts:
            self.mlp = MoE(config.hidden_size, config.intermediate_size, config.num_experts,
                           config.num_experts_per_tok)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, rotation: tuple[Tensor, Tensor],
                attend: Attend) -> Tensor:
        h_BTD = self.input_layernorm(x_BTD)
        h_BTD = self.conv(h_BTD, attend.before(self.layer, h_BTD, self.reach), positions_BT)
        x_BTD = x_BTD + self.self_attn(h_BTD, positions_BT, rotation, attend)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        x_BTD = self.embed_tokens(tokens_BT)
        inverse = rope.inverse_frequencies(self.config.head_dim, self.config.rope_theta, None)
        rotation = rope.rotation(positions_BT, inverse, x_BTD.dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, positions_BT, rotation, attend)
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
