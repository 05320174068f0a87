"""DeepSeek V3 and R1: multi-head latent attention (MLA) and a fine-grained mixture of experts.

DeepSeek-AI, arXiv 2412.19437 and 2501.12948. Parameter names are those of Hugging Face's
DeepseekV3ForCausalLM, whose order of operations is followed where rounding could choose another
expert.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicugna.errors import config_error
from vicugna.models.layers import decoder, rope
from vicugna.models.layers.attention import Attend
from vicugna.models.layers.config import Shape
from vicugna.models.layers.mask import Span
from vicugna.models.layers.mlp import SwiGLU
from vicugna.models.layers.moe import Balanced, Experts
from vicugna.models.layers.norm import RMSNorm
from vicugna.models.llama import Layer

LATENT_EPS = 1e-6  # of the norms of latents, whatever rms_norm_eps says
ALIASES = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
ONLY = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}  # supported
OFF = ("norm_topk_prob", "rope_interleave")  # null means false


@dataclass(frozen=True)
class Config(Shape):
    """The keys of a DeepSeek V3's config.json, with Hugging Face's defaults.

    The first `first_k_dense_replace` layers have a feed-forward of width `intermediate_size`, the
    others experts of width `moe_intermediate_size`.
    """

    MAY_BE_ZERO = ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers")

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int = 128
    head_dim: int = 64  # the rotary part of a head
    max_position_embeddings: int = 4096
    rope_scaling: dict[str, Any] | None = None
    rope_interleave: bool = True
    attention_bias: bool = False
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    first_k_dense_replace: int = 3
    moe_intermediate_size: int = 2048
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    num_nextn_predict_layers: int = 1
    scoring_func: str | None = None  # written by DeepSeek and needed by some readers
    topk_method: str | None = None
    moe_layer_freq: int | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """As `Shape.from_dict`."""
        given = {ALIASES.get(key, key): False if x is None and key in OFF else x
                 for key, x in values.items()}
        for key in ("num_attention_heads", "max_position_embeddings", "qk_rope_head_dim"):
            given[key] = getattr(cls, key) if given.get(key) is None else given[key]
        if given.get("head_dim") is None:
            given["head_dim"] = given["qk_rope_head_dim"]
        return super().from_dict(given)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("q_lora_rank", 1)
        self.check_experts("n_routed_experts")
        E, J = self.n_routed_experts, self.n_group
        for name, fine, fact in (
                ("num_key_value_heads", self.num_key_value_heads == self.num_attention_heads,
                 f"all {self.num_attention_heads} heads share one latent"),
                ("head_dim", self.head_dim == self.qk_rope_head_dim,
                 f"qk_rope_head_dim is {self.qk_rope_head_dim}"),
                ("n_group", E % J == 0 and E >= 2 * J, f"n_routed_experts is {E}: groups must be "
                 "of equal size, two or more"),
                ("topk_group", self.topk_group <= J, f"n_group is {J}"),
                *((name, getattr(self, name) in (None, value), f"only {value!r} is supported")
                  for name, value in ONLY.items())):
            if not fine:
                raise config_error(f"{name} is {getattr(self, name)!r}, but {fact}")

    def to_dict(self) -> dict[str, Any]:
        """config.json's content."""
        values = {key: x for key, x in asdict(self).items() if key not in ONLY or x is not None}
        return {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
                "hidden_act": "silu", **values}


class Attention(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434, section 2.1): a token's keys and values are
    projected from one compressed latent of R features. A head's query and key have C features
    without position and P rotary ones; the rotary key is shared by all heads. Values have U.

    Two forms of the same result. Expanded, every head has its own keys and values. Absorbed, the
    up-projections are applied to queries and outputs instead, and all heads attend to the latent
    and the rotary key: the KV cache holds R + P numbers a token.
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.span = layer, Span()
        self.rotate = rope.rotate_pairs if config.rope_interleave else rope.rotate
        self.H, self.R, self.U = config.num_attention_heads, config.kv_lora_rank, config.v_head_dim
        self.C, self.P = config.qk_nope_head_dim, config.qk_rope_head_dim
        D, bias = config.hidden_size, config.attention_bias
        self.rank = config.q_lora_rank
        if self.rank is None:
            self.q_proj = nn.Linear(D, self.H * (self.C + self.P), bias=False)
        else:
            self.q_a_proj = nn.Linear(D, self.rank, bias=bias)
            self.q_a_layernorm = RMSNorm(self.rank, LATENT_EPS)
            self.q_b_proj = nn.Linear(self.rank, self.H * (self.C + self.P), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, self.R + self.P, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.R, LATENT_EPS)
        self.kv_b_proj = nn.Linear(self.R, self.H * (self.C + self.U), bias=False)
        self.o_proj = nn.Linear(self.H * self.U, D, bias=bias)
        scaling = config.rope_scaling or {}
        self.scale = (self.C + self.P) ** -0.5 * rope.mscale(
            scaling.get("factor", 1.0), scaling.get("mscale_all_dim") or 0.0) ** 2

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, rotation: tuple[Tensor, Tensor],
                attend: Attend) -> Tensor:
        B, T, _ = x_BTD.shape
        if self.rank is None:
            q = self.q_proj(x_BTD)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        q_BTHC, q_BTHP = q.view(B, T, self.H, -1).split((self.C, self.P), dim=-1)
        latent_BTR, k_BTP = self.kv_a_proj_with_mqa(x_BTD).split((self.R, self.P), dim=-1)
        latent_BT1R = self.kv_a_layernorm(latent_BTR)[:, :, None]
        q_BTHP = self.rotate(q_BTHP, *rotation)
        k_BT1P = self.rotate(k_BTP[:, :, None], *rotation)
        form = self._absorbed if attend.has_kv_cache else self._expanded
        o_BTHU = form(q_BTHC, q_BTHP, latent_BT1R, k_BT1P, attend)
        return self.o_proj(o_BTHU.reshape(B, T, self.H * self.U))

    def _expanded(self, q_BTHC: Tensor, q_BTHP: Tensor, latent_BT1R: Tensor, k_BT1P: Tensor,
                  attend: Attend) -> Tensor:
        kv = self.kv_b_proj(latent_BT1R).view(*q_BTHC.shape[:3], -1)
        k_BTHC, v_BTHU = kv.split((self.C, self.U), dim=-1)
        q = torch.cat((q_BTHC, q_BTHP), dim=-1)
        k = torch.cat((k_BTHC, k_BT1P.expand(-1, -1, self.H, -1)), dim=-1)
        return attend(self.layer, q, k, v_BTHU, self.span, self.scale)

    def _absorbed(self, q_BTHC: Tensor, q_BTHP: Tensor, latent_BT1R: Tensor, k_BT1P: Tensor,
                  attend: Attend) -> Tensor:
        up_k_HCR, up_v_HUR = self.kv_b_proj.weight.unflatten(0, (self.H, -1)).split(
            (self.C, self.U), dim=1)
        q_BTHR = torch.einsum("bthc,hcr->bthr", q_BTHC, up_k_HCR)
        q = torch.cat((q_BTHR, q_BTHP), dim=-1)
        k = torch.cat((latent_BT1R, k_BT1P), dim=-1)
        o_BTHR = attend(self.layer, q, k, None, self.span, self.scale)[..., :self.R]
        return torch.einsum("bthr,hur->bthu", o_BTHR, up_v_HUR)


class Router(Balanced):
    """Group-limited top-k over biased sigmoid scores (arXiv 2412.19437, section 2.1.2)."""

    bias_name = "e_score_correction_bias"
    e_score_correction_bias: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.add_bias(config.n_routed_experts)
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Experts [N, k] (int64) and their weights [N, k] (float32)."""
        c = self.config
        with torch.autocast(x_ND.device.type, enabled=False):
            score_NE = F.linear(x_ND.float(), self.weight.float()).sigmoid()
        # Group-limited top-k: of J groups of experts, scored by the sum of their two highest biased
        # scores, only the best `topk_group` can be chosen from.
        biased_NJe = (score_NE.detach() + self.e_score_correction_bias).unflatten(
            1, (c.n_group, -1))
        group_NJ = biased_NJe.topk(2, dim=-1).values.sum(-1)
        groups_Nj = group_NJ.topk(c.topk_group, dim=-1, sorted=False).indices
        masked_NJ = torch.ones_like(group_NJ, dtype=torch.bool).scatter_(1, groups_Nj, False)
        biased_NE = biased_NJe.masked_fill(masked_NJ[:, :, None], float("-inf")).flatten(1)
        chosen_Nk = biased_NE.topk(c.num_experts_per_tok, dim=-1, sorted=False).indices
        self.count(chosen_Nk)
        weight_Nk = score_NE.gather(1, chosen_Nk)
        if c.norm_topk_prob:
            weight_Nk = weight_Nk / (weight_Nk.sum(-1, keepdim=True) + 1e-20)
        return chosen_Nk, weight_Nk * c.routed_scaling_factor


class MoE(nn.Module):
    """The weighted sum of the routed experts, and the shared experts."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        D, F_, E = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
        self.gate = Router(config)
        self.experts = Experts(D, F_, E)
        self.shared_experts = SwiGLU(D, F_ * config.n_shared_experts)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        routed_ND = self.experts(x_ND, *self.gate(x_ND))
        return routed_ND.view_as(x_BTD) + self.shared_experts(x_BTD)


class Network(decoder.Network):
    @staticmethod
    def layer(config: Config, n: int) -> Layer:
        dense = n < config.first_k_dense_replace
        return Layer(config, Attention(config, n), SwiGLU(
            config.hidden_size, config.intermediate_size) if dense else MoE(config))
