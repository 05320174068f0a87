"""Many processes: DDP, or FSDP2."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vicugna import models
from vicugna.distributed import Ranks
from vicugna.errors import VicugnaError
from vicugna.training.loss import Loss
from vicugna.training.recipe import StageSpec


def wrap(loss: Loss, spec: StageSpec, ranks: Ranks) -> nn.Module:
    """The loss made data-parallel; itself when alone. VicugnaError for FSDP2 with Muon."""
    if ranks.world == 1:
        return loss
    if spec.parallel == "ddp":
        return DistributedDataParallel(loss)
    if spec.optimiser.kind == "muon":
        raise VicugnaError("Muon needs whole matrices, which FSDP2 shards",
                           "optimiser.kind", "Use adamw with parallel: fsdp, or parallel: ddp")
    policy = MixedPrecisionPolicy(param_dtype=loss.dtype, reduce_dtype=torch.float32)
    for layer in loss.network.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(loss, mp_policy=replace(policy, cast_forward_inputs=False))  # the batch's weights
    return loss


def whole(network: nn.Module) -> nn.Module:
    """The network in this process's memory; FSDP2's shards are gathered (on the first rank)."""
    if not any(isinstance(p, DTensor) for p in network.parameters()):
        return network.cpu()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(network, options=options)
    config: Any = network.config
    fresh: Any = models.build(config.to_dict())
    if state:
        fresh.load_state_dict(state)
    return fresh
