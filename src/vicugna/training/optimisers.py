"""Muon for the matrices inside the layers, AdamW for the rest; learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from vicugna.training.recipe import OptimiserSpec


def build(network: nn.Module, spec: OptimiserSpec) -> list[torch.optim.Optimizer]:
    """The optimisers of `spec`, torch's own: AdamW alone, or Muon (Jordan et al., 2024) for the
    layers' 2-D projections with AdamW for embeddings, norms, convolutions and scales."""
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    by_muon = {name for name, p in named
               if spec.kind == "muon" and p.ndim == 2 and "_proj" in name}
    matrices = [p for name, p in named if name in by_muon]
    decayed = [p for name, p in named if name not in by_muon and p.ndim >= 2]
    plain = [p for name, p in named if name not in by_muon and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": spec.weight_decay},
              {"params": plain, "weight_decay": 0.0}]
    optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=spec.learning_rate,
        betas=(spec.beta1, spec.beta2), fused=True)]
    if matrices:
        optimisers.append(torch.optim.Muon(matrices, lr=spec.muon_learning_rate,
                                           weight_decay=spec.weight_decay))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["base_lr"] = group["lr"]
    return optimisers


def factor(spec: OptimiserSpec, step: int, steps: int) -> float:
    """Share of the base learning rate at `step` of `steps`.

    `wsd`: linear warm-up, a plateau, then linear decay over the last `decay` share of the steps
    (Hu et al., arXiv 2404.06395). `cosine`: warm-up, then half a cosine. Both end at `final`.
    """
    warm = min(1.0, (step + 1) / spec.warmup) if spec.warmup else 1.0
    if spec.schedule == "cosine":
        through = min(1.0, max(0.0, (step - spec.warmup) / max(1, steps - spec.warmup)))
        share = 0.5 * (1 + math.cos(math.pi * through))
    else:
        share = min(1.0, (steps - step) / max(1.0, spec.decay * steps))
    return warm * (spec.final + (1 - spec.final) * share)


def set_factor(optimisers: Sequence[torch.optim.Optimizer], share: float) -> None:
    """Set every group's learning rate to `share` of its base."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["base_lr"] * share
