"""Muon (Jordan et al., 2024), whose matrices of one shape are orthogonalised together."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

STACK = 1 << 28  # elements orthogonalised at once
Matrix = tuple[Tensor, Tensor, Tensor]  # parameter, gradient, momentum


class Muon(torch.optim.Muon):
    """torch.optim.Muon, the same to the bit on CPU, with its matrix products batched: on a GPU many
    small products would wait for each other."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, params, grads, momenta)
            shapes = defaultdict[torch.Size, list[Matrix]](list)
            for matrix in zip(params, grads, momenta, strict=True):
                shapes[matrix[0].shape].append(matrix)
            for shape, matrices in shapes.items():
                size = max(1, STACK // shape.numel())
                for start in range(0, len(matrices), size):
                    _update(group, matrices[start:start + size])


def _update(group: dict[str, Any], matrices: list[Matrix]) -> None:
    """Nesterov momentum, orthogonalised; larger steps for tall matrices."""
    updates = []
    for _, grad, momentum in matrices:
        momentum.lerp_(grad, 1 - group["momentum"])
        updates.append(grad.lerp(momentum, group["momentum"]).bfloat16())
    rows, columns = updates[0].shape
    lr = group["lr"] * max(1, rows / columns) ** 0.5
    for (param, *_), update in zip(matrices, _orthogonalise(group, torch.stack(updates)),
                                   strict=True):
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update, alpha=-lr)


def _orthogonalise(group: dict[str, Any], x_NRC: Tensor) -> Tensor:
    """Newton and Schulz's iteration of a stack of matrices, in bfloat16: singular values near 1."""
    a, b, c = group["ns_coefficients"]
    tall = x_NRC.shape[1] > x_NRC.shape[2]
    x = x_NRC.mT if tall else x_NRC
    norm_N = torch.stack([matrix.norm() for matrix in x])
    x = x / norm_N.clamp(min=group["eps"])[:, None, None]
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
