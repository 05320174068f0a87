"""A network and its objective as one module, the unit that DDP and FSDP2 wrap."""

from typing import Any

import torch
from torch import Tensor, nn

from vicugna.models.layers.attention import Dense
from vicugna.models.layers.moe import capture_router_logits
from vicugna.training.batch import TrainingBatch
from vicugna.training.logprobs import token_logprobs
from vicugna.training.objectives import LINEAR, Objective, balance_loss


class Loss(nn.Module):
    """`loss(batch)`, a float32 scalar. `precision` is that of matrix products: bf16 or fp32."""

    def __init__(self, network: nn.Module, objective: Objective, precision: str) -> None:
        super().__init__()
        self.network: Any = network
        self.objective = objective
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def forward(self, batch: TrainingBatch) -> Tensor:
        """The objective of the batch. While training a network whose config has a
        `router_aux_loss_coef`, that times the routers' balance loss is added for each target, so
        that however rows are split, the mean over targets includes the mean of it once."""
        with (torch.autocast(batch.tokens_BT.device.type, self.dtype,
                             self.dtype == torch.bfloat16),
              capture_router_logits(self.network) as router_logits):
            hidden_BTD = self.network(batch.tokens_BT, batch.positions_BT,
                                      Dense(batch.positions_BT, self.network.model.spans))
        weighted_BT = batch.weights_BT != 0
        logprobs_BT = torch.zeros_like(batch.weights_BT).masked_scatter(
            weighted_BT, self._logprobs(hidden_BTD, weighted_BT, batch))
        loss = self.objective(logprobs_BT, batch)
        coefficient = getattr(self.network.config, "router_aux_loss_coef", 0.0)
        if coefficient and router_logits and self.network.training:
            padding_BT = weighted_BT.flip(1).cumsum(1).flip(1) == 0  # after the last target
            logits_LNE = torch.stack(router_logits)[:, ~padding_BT.flatten()]
            top_k = self.network.config.num_experts_per_tok
            loss = loss + coefficient * weighted_BT.sum() * balance_loss(logits_LNE, top_k)
        return loss

    def _logprobs(self, hidden_BTD: Tensor, weighted_BT: Tensor, batch: TrainingBatch) -> Tensor:
        gradient_N = None
        if self.objective in LINEAR and torch.is_grad_enabled():
            zeros_BT = torch.zeros_like(batch.weights_BT, requires_grad=True)
            gradient_BT, = torch.autograd.grad(self.objective(zeros_BT, batch), zeros_BT)
            gradient_N = gradient_BT[weighted_BT]
        return token_logprobs(hidden_BTD[weighted_BT], self.network.lm_head.weight,
                              batch.targets_BT[weighted_BT], self.dtype, gradient_N)
