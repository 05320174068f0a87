"""Mixtral: a Mistral whose feed-forward is a mixture of experts, two of eight for each token.

Jiang et al., arXiv 2401.04088. Parameter names are those of the published files, except
that experts are stacked here and separate there.
"""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from vicugna.models.layers import decoder
from vicugna.models.layers.config import Shape
from vicugna.models.layers.mask import Span
from vicugna.models.layers.moe import Experts, Router
from vicugna.models.llama import Attention, Layer


@dataclass(frozen=True)
class Config(Shape):
    """The keys of a Mixtral's config.json, with Hugging Face's defaults. `sliding_window` None
    means full attention.

    Training adds `router_aux_loss_coef` times the load-balancing loss of the routers. The noise of
    `router_jitter_noise` is not applied; the key is written back.
    """

    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1000000.0
    rope_scaling: dict[str, Any] | None = None
    sliding_window: int | None = None
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("sliding_window", 1)
        self.check_experts("num_local_experts")

    def to_dict(self) -> dict[str, Any]:
        """config.json's content."""
        return {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
                "hidden_act": "silu", **asdict(self)}


class SparseMoe(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        D, E = config.hidden_size, config.num_local_experts
        self.gate = Router(D, E, config.num_experts_per_tok)
        self.experts = Experts(D, config.intermediate_size, E)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        _, chosen_Nk, weight_Nk = self.gate(x_ND)
        return self.experts(x_ND, chosen_Nk, weight_Nk).view_as(x_BTD)


class Network(decoder.Network):
    @staticmethod
    def layer(config: Config, n: int) -> Layer:
        return Layer(config, Attention(config, n, Span(config.sliding_window)), SparseMoe(config),
                     "block_sparse_moe")
