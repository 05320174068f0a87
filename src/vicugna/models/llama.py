"""Llama 1 to 3.3: pre-norm transformer with RoPE, grouped queries and SwiGLU.

Touvron et al., arXiv 2302.13971 and 2307.09288; Llama Team, arXiv 2407.21783. Parameter names are
those of Hugging Face's LlamaForCausalLM.
"""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from vicugna.models.layers import decoder, rope
from vicugna.models.layers.attention import Attend
from vicugna.models.layers.config import Shape
from vicugna.models.layers.mask import Span
from vicugna.models.layers.mlp import SwiGLU
from vicugna.models.layers.norm import RMSNorm


@dataclass(frozen=True)
class Config(Shape):
    """The keys of a Llama's config.json, with Hugging Face's defaults."""

    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False

    def to_dict(self) -> dict[str, Any]:
        """config.json's content."""
        return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
                **asdict(self)}


class Attention(nn.Module):
    """Grouped-query attention with RoPE. `biases`: whether q, k and v have one, and whether o."""

    def __init__(self, config: Shape, layer: int, span: Span = Span(),
                 biases: tuple[bool, bool] = (False, False)) -> None:
        super().__init__()
        self.layer, self.span = layer, span
        self.H, self.G = config.num_attention_heads, config.num_key_value_heads
        self.K = config.head_dim
        D = config.hidden_size
        self.q_proj = nn.Linear(D, self.H * self.K, bias=biases[0])
        self.k_proj = nn.Linear(D, self.G * self.K, bias=biases[0])
        self.v_proj = nn.Linear(D, self.G * self.K, bias=biases[0])
        self.o_proj = nn.Linear(self.H * self.K, D, bias=biases[1])

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, rotation: tuple[Tensor, Tensor],
                attend: Attend) -> Tensor:
        B, T, _ = x_BTD.shape
        q = self.q_proj(x_BTD).view(B, T, self.H, self.K)
        k = self.k_proj(x_BTD).view(B, T, self.G, self.K)
        v = self.v_proj(x_BTD).view(B, T, self.G, self.K)
        q, k = self.embed_positions(q, k, positions_BT, rotation)
        return self.o_proj(attend(self.layer, q, k, v, self.span).reshape(B, T, self.H * self.K))

    def embed_positions(self, q_BTHK: Tensor, k_BTGK: Tensor, positions_BT: Tensor,
                        rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """RoPE of queries and keys. Architectures that also normalise or scale them override it."""
        return rope.rotate(q_BTHK, *rotation), rope.rotate(k_BTGK, *rotation)


class Layer(nn.Module):
    """Pre-norm residual block: attention, then a feed-forward, in files under the name `mlp`."""

    def __init__(self, config: Shape, attention: nn.Module, feed_forward: nn.Module,
                 mlp: str = "mlp") -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_name = mlp
        self.add_module(mlp, feed_forward)

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, rotation: tuple[Tensor, Tensor],
                attend: Attend) -> Tensor:
        h_BTD = self.input_layernorm(x_BTD)
        x_BTD = x_BTD + self.self_attn(h_BTD, positions_BT, rotation, attend)
        feed_forward = getattr(self, self.mlp_name)
        return x_BTD + feed_forward(self.post_attention_layernorm(x_BTD))


class Network(decoder.Network):
    @staticmethod
    def layer(config: Config, n: int) -> Layer:
        biases = config.attention_bias, config.attention_bias
        return Layer(config, Attention(config, n, Span(), biases),
                     SwiGLU(config.hidden_size, config.intermediate_size, config.mlp_bias))
