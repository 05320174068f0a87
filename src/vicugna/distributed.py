"""One process or many: the process group of torchrun."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run, and the device it computes on."""
    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Barrier: wait until every rank has called this."""
        if self.world > 1:
            dist.barrier()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on all ranks."""
        gathered = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(gathered, value)
        return gathered

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
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if "WORLD_SIZE" not in os.environ:
        yield Ranks(device=device)
        return
    if cuda:
        torch.cuda.set_device(device)
    # The others wait while the first rank saves or releases; torchrun ends them when one fails.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
