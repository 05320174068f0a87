"""Weighted next-token loss, computed without ever holding all the logits. A token to learn weighs
1, a sampled one its advantage, one that is only read 0."""

from typing import Any

import torch
from torch import Tensor, nn

from vicugna.models.layers.attention import Dense
from vicugna.models.layers.moe import balance_loss, capture_router_logits

CHUNK = 2048  # rows of logits held at once, in the precision of the matrix products
SLICE = 1 << 21  # logits turned to float32 at once: few enough to stay in the processor's cache


class _WeightedNLL(torch.autograd.Function):
    """sum_n w_n * -log p(target_n), with both gradients made in the forward pass, by chunks: the
    logits [N, V] are needed only once (as in the Liger kernel, arXiv 2410.10989)."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, head_VD: Tensor, target_N: Tensor, weight_N: Tensor,
                dtype: torch.dtype) -> Tensor:
        head, x = head_VD.to(dtype), x_ND.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x)
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=x.device)
        for start in range(0, x.shape[0], CHUNK):  # no rows at all are fine
            part = slice(start, start + CHUNK)
            logits_NV = x[part] @ head.T
            total += _to_gradient(logits_NV, target_N[part, None], weight_N[part, None].float())
            grad_x[part] = logits_NV @ head
            grad_head += logits_NV.T @ x[part]
        ctx.save_for_backward(grad_x, grad_head)
        ctx.dtypes = x_ND.dtype, head_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None, None]:
        grad_x, grad_head = (grad * grads[0] for grad in ctx.saved_tensors)
        return grad_x.to(ctx.dtypes[0]), grad_head.to(ctx.dtypes[1]), None, None, None


def _to_gradient(logits_NV: Tensor, target_N1: Tensor, weight_N1: Tensor) -> Tensor:
    """Replace logits by the gradient of their weighted loss, in place; the loss itself."""
    total = torch.zeros((), dtype=torch.float32, device=logits_NV.device)
    size = max(1, SLICE // logits_NV.shape[1])
    for logits, target, weight in zip(logits_NV.split(size), target_N1.split(size),
                                      weight_N1.split(size), strict=True):
        p = torch.log_softmax(logits, -1, dtype=torch.float32)
        total -= (p.gather(-1, target) * weight).sum()
        p.exp_().scatter_add_(-1, target, torch.full_like(weight, -1.0))
        logits.copy_(p.mul_(weight))
    return total


class Objective(nn.Module):
    """A network and its loss as one module, the unit that DDP and FSDP2 wrap."""

    def __init__(self, network: nn.Module, precision: str) -> None:
        super().__init__()
        self.network: Any = network
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor, targets_BT: Tensor,
                weights_BT: Tensor) -> Tensor:
        """Sum over tokens of weight * -log p(target), a float32 scalar.

        While training a network whose config has a `router_aux_loss_coef`, that times the routers'
        balance loss is added for each learned token, so that whatever the split into rows and
        ranks, the mean over tokens holds the mean of it once.
        """
        with (torch.autocast(tokens_BT.device.type, self.dtype, self.dtype == torch.bfloat16),
              capture_router_logits(self.network) as logits):
            hidden_BTD = self.network(tokens_BT, positions_BT, Dense(positions_BT))
        learned = weights_BT != 0
        loss = _WeightedNLL.apply(hidden_BTD[learned], self.network.lm_head.weight,
                                  targets_BT[learned], weights_BT[learned], self.dtype)
        share = getattr(self.network.config, "router_aux_loss_coef", 0.0)
        if share and logits and self.network.training:
            padding_BT = learned.flip(1).cumsum(1).flip(1) == 0  # stands after the last target
            logits_LNE = torch.stack(logits)[:, ~padding_BT.flatten()]
            top_k = self.network.config.num_experts_per_tok
            loss = loss + share * learned.sum() * balance_loss(logits_LNE, top_k)
        return loss
