"""Log-probabilities of tokens from hidden states, by chunks: all the logits [N, V] never exist."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 2048  # rows of logits computed at once, in the dtype of the matrix products
SLICE = 1 << 21  # logits converted to float32 at once: few enough to stay in the CPU's cache


def token_logprobs(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, dtype: torch.dtype,
                   gradient_N: Tensor | None = None) -> Tensor:
    """log p(target) under softmax(hidden @ head.T) of each row, float32 [N]; matrix products in
    `dtype`.

    The backward pass computes the logits again. For a loss linear in the log-probabilities that is
    not needed: its gradient with respect to them, but for a factor common to all, is known now.
    Given as `gradient_N`, the gradients of hidden states and head are computed in the forward pass,
    while the logits are there (as in the Liger kernel, arXiv 2410.10989).
    """
    if gradient_N is not None and torch.is_grad_enabled():
        return _LinearLoss.apply(hidden_ND, head_VD, target_N, dtype, gradient_N)
    chunks = zip(hidden_ND.split(CHUNK), target_N.split(CHUNK), strict=True)
    return torch.cat([checkpoint(_chunk, hidden_CD, head_VD, target_C, dtype, use_reentrant=False)
                      for hidden_CD, target_C in chunks])


def _chunk(hidden_CD: Tensor, head_VD: Tensor, target_C: Tensor, dtype: torch.dtype) -> Tensor:
    logits_CV = hidden_CD.to(dtype) @ head_VD.to(dtype).T
    return logits_CV.log_softmax(-1, torch.float32).gather(-1, target_C[:, None])[:, 0]


class _LinearLoss(torch.autograd.Function):
    """token_logprobs, with the gradients made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, dtype: torch.dtype,
                gradient_N: Tensor) -> Tensor:
        head, x = head_VD.to(dtype), hidden_ND.to(dtype)
        logprobs_N = torch.empty(len(x), dtype=torch.float32, device=x.device)
        grad_x, grad_head = torch.empty_like(x), torch.zeros_like(head, dtype=torch.float32)
        for start in range(0, len(x), CHUNK):  # no rows at all are fine
            part = slice(start, start + CHUNK)
            logits_CV = x[part] @ head.T
            logprobs_N[part] = _to_gradient(logits_CV, target_N[part], gradient_N[part])
            grad_x[part] = logits_CV @ head
            grad_head += logits_CV.T @ x[part]
        ctx.dtypes = hidden_ND.dtype, head_VD.dtype
        ctx.save_for_backward(gradient_N, grad_x, grad_head)
        return logprobs_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None, None]:
        gradient_N, grad_x, grad_head = ctx.saved_tensors
        if len(gradient_N):
            largest = gradient_N.abs().argmax()
            factor = grads[0][largest] / gradient_N[largest]
            grad_x, grad_head = grad_x * factor, grad_head * factor
        return grad_x.to(ctx.dtypes[0]), grad_head.to(ctx.dtypes[1]), None, None, None


def _to_gradient(logits_CV: Tensor, target_C: Tensor, gradient_C: Tensor) -> Tensor:
    """Log-probabilities of the targets [C]; the gradient of the logits replaces them."""
    size = max(1, SLICE // logits_CV.shape[1]) if logits_CV.device.type == "cpu" else CHUNK
    logprobs = []
    for logits, target_S1, gradient_S1 in zip(
            logits_CV.split(size), target_C[:, None].split(size),
            gradient_C[:, None].float().split(size), strict=True):
        p_SV = logits.log_softmax(-1, torch.float32)
        logprobs.append(p_SV.gather(-1, target_S1))
        p_SV.exp_().scatter_add_(-1, target_S1, torch.full_like(gradient_S1, -1.0))
        logits.copy_(p_SV.mul_(-gradient_S1))
    return torch.cat(logprobs)[:, 0]
