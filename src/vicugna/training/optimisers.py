"""Muon for the matrices inside the layers, AdamW for the rest; learning-rate schedules."""

import math

import torch
from torch import nn

from vicugna.training.muon import Muon
from vicugna.training.recipe import OptimiserSpec


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
