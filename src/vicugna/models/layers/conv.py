"""A short causal depthwise convolution that does not cross the borders of packed documents."""

from typing import Any

import torch
from torch import Tensor, nn


class _CausalConv(torch.autograd.Function):
    """y_t = x_t + sum_i w_i * x_{t-i}: whole shifted slices, then the few rows corrected whose
    predecessor belongs to another document. `history` is x with `width - 1` earlier rows."""

    @staticmethod
    def forward(ctx: Any, history_BSD: Tensor, weight: Tensor, positions_BT: Tensor) -> Tensor:
        n, T = weight.shape[0] - 1, positions_BT.shape[1]
        w = weight.to(history_BSD.dtype)
        y_BTD = history_BSD[:, n:] * (1 + w[0])
        foreign = [torch.nonzero(positions_BT < i, as_tuple=True) for i in range(n + 1)]
        for i in range(1, n + 1):
            y_BTD.addcmul_(history_BSD[:, n - i : n - i + T], w[i])
            b, t = foreign[i]
            y_BTD[b, t] -= history_BSD[b, t + (n - i)] * w[i]
        ctx.save_for_backward(history_BSD, w, *(index for pair in foreign for index in pair))
        ctx.dtype = weight.dtype
        return y_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        history_BSD, w, *indices = ctx.saved_tensors
        g_BTD, n = grads[0], w.shape[0] - 1
        T = g_BTD.shape[1]
        grad_history = torch.zeros_like(history_BSD)
        grad_history[:, n:] = g_BTD * (1 + w[0])
        grad_w = torch.empty(w.shape, dtype=torch.float32, device=w.device)
        grad_w[0] = _column_sums(g_BTD, history_BSD[:, n:])
        for i in range(1, n + 1):
            b, t = indices[2 * i], indices[2 * i + 1]
            rows = slice(n - i, n - i + T)
            wrong = g_BTD[b, t]
            grad_history[:, rows].addcmul_(g_BTD, w[i])
            grad_history[b, t + (n - i)] -= wrong * w[i]
            grad_w[i] = (_column_sums(g_BTD, history_BSD[:, rows])
                         - (wrong * history_BSD[b, t + (n - i)]).float().sum(0))
        return grad_history, grad_w.to(ctx.dtype), None


def _column_sums(a_BTD: Tensor, b_BTD: Tensor) -> Tensor:
    """Sum over B and T of a * b, float32 [D]."""
    return (a_BTD * b_BTD).sum((0, 1), dtype=torch.float32)


class CausalConv(nn.Module):
    """Residual depthwise convolution over a token and its `width - 1` predecessors, initially zero.

    y_t = x_t + sum_i w_i * x_{t-i}, where the token at position p has p predecessors.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, hidden_size))

    def forward(self, x_BTD: Tensor, state: Tensor, positions_BT: Tensor) -> Tensor:
        """`state` is what `Attend.conv_state` returns."""
        if state.dim() == 4:  # [B, T, n, D]: a flat batch of many sequences, only for inference
            w = self.weight.to(x_BTD.dtype)
            return x_BTD * (1 + w[0]) + (state * w[1:].flip(0)).sum(2)
        history = torch.cat([state.to(x_BTD.dtype), x_BTD], dim=1)
        return _CausalConv.apply(history, self.weight, positions_BT)
