"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

from typing import Any

import torch
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    """y = w * x / rms(x) over the last axis, with the backward pass in closed form.

    PyTorch composes it from single operations on CPU; this form touches memory about a third as
    often. The statistics are float32 whatever the input.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        width = x.shape[-1]
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        rstd = square.div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        normal = x * rstd
        grad = grads[0].to(normal.dtype)
        product = grad * normal
        grad_weight = product.flatten(0, -2).sum(0)
        mean = (product @ weight.to(product.dtype)).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = torch.addcmul(grad * weight, normal, mean, value=-1).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight, None, None


class RMSNorm(nn.Module):
    """Scale the last axis (width D) to unit root mean square, times a learned weight [D].

    Computed in float32; the result has the input's dtype, or autocast's where that is on.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return _RMSNorm.apply(x, self.weight, self.eps, dtype)
