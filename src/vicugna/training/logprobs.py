"""Log-probabilities of tokens from hidden states, by chunks: all the logits [N, V] never exist."""

from typing import Any

import torch
from torch import Tensor

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
    return _TokenLogprobs.apply(hidden_ND, head_VD, target_N, dtype,
                                gradient_N if torch.is_grad_enabled() else None)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, dtype: torch.dtype,
                gradient_N: Tensor | None) -> Tensor:
        logprobs_N, *gradients = _by_chunks(hidden_ND, head_VD, target_N, dtype, gradient_N)
        ctx.dtype, ctx.linear = dtype, gradient_N is not None
        ctx.dtypes = hidden_ND.dtype, head_VD.dtype
        ctx.save_for_backward(*([gradient_N, *gradients] if ctx.linear else
                                [hidden_ND, head_VD, target_N]))
        return logprobs_N

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None, None]:
        if ctx.linear:
            gradient_N, grad_hidden, grad_head = ctx.saved_tensors
            if len(gradient_N):
                largest = gradient_N.abs().argmax()
                factor = grads[0][largest] / gradient_N[largest]
                grad_hidden, grad_head = grad_hidden * factor, grad_head * factor
        else:
            hidden_ND, head_VD, target_N = ctx.saved_tensors
            _, grad_hidden, grad_head = _by_chunks(hidden_ND, head_VD, target_N, ctx.dtype,
                                                   grads[0])
        return grad_hidden.to(ctx.dtypes[0]), grad_head.to(ctx.dtypes[1]), None, None, None


def _by_chunks(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, dtype: torch.dtype,
               gradient_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities, gradient of hidden, gradient of head in float32); the gradients, which
    follow from that of the log-probabilities, are empty without it."""
    head, x = head_VD.to(dtype), hidden_ND.to(dtype)
    logprobs_N = torch.empty(len(x), dtype=torch.float32, device=x.device)
    differentiate = gradient_N is not None
    grad_x = torch.empty_like(x if differentiate else x[:0])
    grad_head = torch.zeros_like(head if differentiate else head[:0], dtype=torch.float32)
    for start in range(0, len(x), CHUNK):  # no rows at all are fine
        part = slice(start, start + CHUNK)
        logits_CV = x[part] @ head.T
        if gradient_N is None:
            logprobs_N[part] = _logprobs(logits_CV, target_N[part], None)
            continue
        logprobs_N[part] = _logprobs(logits_CV, target_N[part], gradient_N[part])
        grad_x[part] = logits_CV @ head
        grad_head += logits_CV.T @ x[part]
    return logprobs_N, grad_x, grad_head


def _logprobs(logits_CV: Tensor, target_C: Tensor, gradient_C: Tensor | None) -> Tensor:
    """Log-probabilities of the targets [C]; with their gradient, that of the logits replaces
    them."""
    size = max(1, SLICE // logits_CV.shape[1]) if logits_CV.device.type == "cpu" else CHUNK
    out = []
    for start in range(0, len(logits_CV), size):
        part = slice(start, start + size)
        logits, target_S1 = logits_CV[part], target_C[part, None]
        p_SV = torch.log_softmax(logits, -1, dtype=torch.float32)
        out.append(p_SV.gather(-1, target_S1)[:, 0])
        if gradient_C is not None:
            minus_S1 = -gradient_C[part, None].float()
            p_SV.exp_().scatter_add_(-1, target_S1, torch.full_like(minus_S1, -1.0))
            logits.copy_(p_SV.mul_(minus_S1))
    return torch.cat(out)
