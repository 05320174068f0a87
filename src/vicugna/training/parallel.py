"""Wrapping a module for many processes: DDP, or FSDP2."""

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from vicugna.distributed import Ranks
from vicugna.errors import VicugnaError
from vicugna.training.loss import Objective
from vicugna.training.recipe import StageSpec


def wrap(objective: Objective, spec: StageSpec, ranks: Ranks) -> nn.Module:
    """The objective made data-parallel; itself when alone. VicugnaError for FSDP2 with Muon."""
    if ranks.world == 1:
        return objective
    if spec.parallel == "ddp":
        return DistributedDataParallel(objective)
    if spec.optimiser.kind == "muon":
        raise VicugnaError("Muon needs whole matrices, which FSDP2 shards",
                           "optimiser.kind", "Use adamw with parallel: fsdp, or parallel: ddp")
    policy = MixedPrecisionPolicy(param_dtype=objective.dtype, reduce_dtype=torch.float32)
    for part in (*objective.network.model.layers, objective):
        fully_shard(part, mp_policy=policy)
    return objective
