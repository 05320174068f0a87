"""One process or many: the process group of torchrun, and wrapping a module for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from vicugna.errors import VicugnaError


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run, and the device it computes on."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes the files that only one may write."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when every rank is here."""
        if self.world > 1:
            dist.barrier()

    def total(self, *values: float) -> list[float]:
        """The sum over all ranks of each value (float64)."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the group that torchrun describes in the environment; alone, a group of one."""
    cuda = torch.cuda.is_available()
    if "WORLD_SIZE" not in os.environ:
        yield Ranks(device=torch.device("cuda" if cuda else "cpu"))
        return
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    # The others wait while the first rank evaluates; torchrun ends them when one dies.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=7))
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def wrap(module: nn.Module, network: nn.Module, kind: str, precision: str, muon: bool,
         ranks: Ranks) -> nn.Module:
    """`module` (which holds `network`) made data-parallel by DDP or FSDP2; itself when alone.

    Raises VicugnaError for FSDP2 with Muon, whose update needs whole matrices.
    """
    if ranks.world == 1:
        return module
    if kind == "ddp":
        return DistributedDataParallel(module)
    if muon:
        raise VicugnaError("Muon needs whole matrices, which FSDP2 shards",
                           "optimiser.kind", "Use adamw with parallel: fsdp, or parallel: ddp")
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None, reduce_dtype=torch.float32)
    for layer in network.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mp_policy=policy)
    fully_shard(module, mp_policy=policy)
    return module


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around one backward pass: DDP sums over ranks in the last only, so that the ranks may take
    different numbers of them."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()
