"""Muon for the matrices inside the layers, AdamW for the rest; learning-rate schedules."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from vicugna.training.recipe import OptimiserSpec

STACK = 1 << 28  # elements that Muon orthogonalises at once
Matrix = tuple[Tensor, Tensor, Tensor]  # parameter, gradient, momentum


def build(network: nn.Module, spec: OptimiserSpec) -> list[torch.optim.Optimizer]:
    """The optimisers of `spec`: AdamW alone, or Muon for the layers' 2-D projections with AdamW
    for embeddings, norms, convolutions and scales."""
    matrices = {name: p for name, p in network.named_parameters()
                if spec.kind == "muon" and p.ndim == 2 and "_proj" in name}
    rest = [p for name, p in network.named_parameters() if name not in matrices]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": spec.weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(
        groups, lr=spec.learning_rate, betas=(spec.beta1, spec.beta2), fused=True)]
    if matrices:
        optimisers.append(Muon(matrices.values(), lr=spec.muon_learning_rate,
                               weight_decay=spec.weight_decay))
    return optimisers


def factor(spec: OptimiserSpec, step: int, steps: int) -> float:
    """Share of the base learning rate at `step` of `steps`, from a linear warm-up to `final`.
    `wsd`: a plateau, then linear decay over the last `decay` share of the steps (Hu et al., arXiv
    2404.06395). `cosine`: half a cosine."""
    warm = min(1.0, (step + 1) / spec.warmup) if spec.warmup else 1.0
    if spec.schedule == "cosine":
        through = min(1.0, max(0.0, (step - spec.warmup) / max(1, steps - spec.warmup)))
        share = 0.5 * (1 + math.cos(math.pi * through))
    else:
        share = min(1.0, (steps - step) / max(1.0, spec.decay * steps))
    return warm * (spec.final + (1 - spec.final) * share)


def schedule(optimisers: list[torch.optim.Optimizer], spec: OptimiserSpec, step: int, steps: int
             ) -> float:
    """Set the learning rates of `step` of `steps`; AdamW's."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = optimiser.defaults["lr"] * factor(spec, step, steps)
    return optimisers[0].param_groups[0]["lr"]


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al., 2024), the same to the bit on CPU, with matrix products of
    one shape batched: on a GPU many small products would wait for each other."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            found: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
            self._init_group(group, *found)
            shapes = defaultdict[torch.Size, list[Matrix]](list)
            for matrix in zip(*found, strict=True):
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
