"""Vicugna: Llama 4's iRoPE idea, done for long context.

Most layers have RoPE and a short sliding window; a few global layers have no position embedding
(NoPE), so no position is out of distribution, and scale their queries by the logarithm of the
number of keys (SSMax, arXiv 2501.19399), so that attention stays peaked however long the context.
Queries and keys are normalised per head (QK norm), and a short causal depthwise convolution mixes
neighbouring tokens before attention, so that one layer can match a key and read the token after it
(see docs/log.md). The feed-forward is dense or a mixture of experts.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vicugna.models import llama
from vicugna.models.layers import decoder
from vicugna.models.layers.attention import Attend
from vicugna.models.layers.config import Shape
from vicugna.models.layers.conv import CausalConv
from vicugna.models.layers.mask import Span
from vicugna.models.layers.mlp import SwiGLU
from vicugna.models.layers.moe import MoE
from vicugna.models.layers.norm import RMSNorm


@dataclass(frozen=True)
class Config(Shape):
    """The keys of a Vicugna's config.json; num_experts 0 means a dense feed-forward.

    Layer n is global when n % global_every == global_every - 2 (with 4: the 3rd, 7th, ...).
    """

    MAY_BE_ZERO = ("num_experts", "num_experts_per_tok")

    max_position_embeddings: int = 1048576
    sliding_window: int = 64
    global_every: int = 4
    conv_width: int = 4
    num_experts: int = 0
    num_experts_per_tok: int = 2
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        self.at_least("global_every", 2)
        super().__post_init__()
        if self.num_experts:
            self.check_experts("num_experts")

    def is_global(self, layer: int) -> bool:
        """Whether `layer` attends to every earlier position."""
        return layer % self.global_every == self.global_every - 2

    def to_dict(self) -> dict[str, Any]:
        """config.json's content."""
        return {"model_type": "vicugna", "architectures": ["VicugnaForCausalLM"], **asdict(self)}


class Attention(llama.Attention):
    def __init__(self, config: Config, layer: int) -> None:
        is_global = config.is_global(layer)
        super().__init__(config, layer, Span(None if is_global else config.sliding_window))
        self.is_global = is_global
        self.q_norm = RMSNorm(self.K, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.K, config.rms_norm_eps)
        if self.is_global:
            self.log_scale = nn.Parameter(torch.empty(self.H))

    def embed_positions(self, q_BTHK: Tensor, k_BTGK: Tensor, positions_BT: Tensor,
                        rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        q, k = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if not self.is_global:
            return super().embed_positions(q, k, positions_BT, rotation)
        scale = self.log_scale[:, None] * (positions_BT + 1).float().log()[:, :, None, None]
        return q * scale.to(q.dtype), k


class Layer(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.conv_rows = layer, config.conv_width - 1
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.conv = CausalConv(config.hidden_size, config.conv_width)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        D, F, E = config.hidden_size, config.intermediate_size, config.num_experts
        self.mlp = MoE(D, F, E, config.num_experts_per_tok) if E else SwiGLU(D, F)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, rotation: tuple[Tensor, Tensor],
                attend: Attend) -> Tensor:
        h_BTD = self.input_layernorm(x_BTD)
        state = attend.conv_state(self.layer, h_BTD, self.conv_rows)
        h_BTD = self.conv(h_BTD, state, positions_BT)
        x_BTD = x_BTD + self.self_attn(h_BTD, positions_BT, rotation, attend)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Network(decoder.Network):
    layer = Layer
