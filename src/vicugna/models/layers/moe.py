"""A mixture of SwiGLU experts with sigmoid routing, balanced without an auxiliary loss.

Routing and the balancing bias follow DeepSeek V3 (arXiv 2412.19437, section 2.1.2): the bias
decides who is chosen, never how much a chosen expert counts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MoE(nn.Module):
    """E experts of width F, of which each token uses `top_k`.

    `expert_bias` [E] is set by training from `tokens_per_expert`, counted in training mode.
    """

    expert_bias: Tensor

    def __init__(self, hidden_size: int, intermediate_size: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(hidden_size, experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))
        self.register_buffer("expert_bias", torch.zeros(experts))
        self.tokens_per_expert = torch.zeros(experts, device="cpu")  # even when built on meta

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        score_NE = torch.sigmoid(self.router(x_ND).float())
        chosen_Nk = (score_NE + self.expert_bias).topk(self.top_k, dim=-1).indices
        weight_Nk = score_NE.gather(-1, chosen_Nk)
        weight_Nk = (weight_Nk / weight_Nk.sum(-1, keepdim=True)).to(x_ND.dtype)

        # Sort (token, choice) pairs by expert, so that each expert sees one contiguous block.
        expert_M, order_M = chosen_Nk.flatten().sort(stable=True)
        count_E = torch.bincount(expert_M, minlength=score_NE.shape[1])
        if self.training:
            self.tokens_per_expert = self.tokens_per_expert.to(count_E.device) + count_E
        token_M = order_M // self.top_k
        blocks = x_ND[token_M].split(count_E.tolist())
        out_MD = torch.cat([self._expert(e, block) for e, block in enumerate(blocks)])
        out_MD = out_MD * weight_Nk.flatten()[order_M, None]
        return torch.zeros_like(x_ND).index_add(0, token_M, out_MD).reshape(x_BTD.shape)

    def _expert(self, e: int, x_MD: Tensor) -> Tensor:
        gate, up = F.linear(x_MD, self.gate_up_proj[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj[e])
