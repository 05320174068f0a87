"""Where a network's parameters are: on one device, on each (DDP), or sharded over all (FSDP2)."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vicugna.checkpoint import Checkpoint, read, state_dict
from vicugna.checkpoint.stored import Stored
from vicugna.distributed import Ranks
from vicugna.errors import VicugnaError
from vicugna.memory import return_freed_memory
from vicugna.training.compiling import compile_layers
from vicugna.training.loss import Loss
from vicugna.training.recipe import RlSpec, StageSpec


def place(loss: Loss, spec: StageSpec, ranks: Ranks,
          values: Iterable[tuple[str, Tensor]] | None = None) -> nn.Module:
    """The loss ready to train on this rank's device: its layers compiled on a GPU, data-parallel
    where there are several.

    The parameters and buffers of a network on the meta device become `values`, one by one, once
    there is memory for this rank's shards: no process ever holds the full float32 network.
    VicugnaError for FSDP2 with Muon.
    """
    network, sharded = loss.network, ranks.world > 1 and spec.parallel == "fsdp"
    if not isinstance(spec, RlSpec):  # whose batches have other shapes in each step
        compile_layers(network, ranks.device)
    if sharded and spec.optimiser.kind == "muon":
        raise VicugnaError("Muon needs full matrices, which FSDP2 shards",
                           "optimiser.kind", "Use adamw with parallel: fsdp, or parallel: ddp")
    if sharded:
        if ranks.device.type == "cpu":
            return_freed_memory()
        policy = MixedPrecisionPolicy(param_dtype=loss.dtype, reduce_dtype=torch.float32)
        for layer in network.model.layers:
            fully_shard(layer, mp_policy=policy)
        # The weights of the batch stay float32.
        fully_shard(loss, mp_policy=replace(policy, cast_forward_inputs=False))
    if values is None:
        network.to(ranks.device)
    else:
        _fill(network, values, ranks.device)
    return DistributedDataParallel(loss) if ranks.world > 1 and not sharded else loss


@torch.no_grad()
def _fill(network: nn.Module, values: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
    """Give memory to a network, and `values` to its parameters and buffers; other buffers are 0."""
    if _sharded(network):
        network.to_empty(device=device)
    else:  # which would untie what is tied
        state_dict.place(network, {name: torch.empty_like(tensor, device=device) for name, tensor in
                                   (*network.named_parameters(), *network.named_buffers())})
    for buffer in network.buffers():
        buffer.zero_()
    state = network.state_dict()
    for name, value in values:
        target = state[name]
        if isinstance(target, DTensor):
            value = distribute_tensor(value.to(device), target.device_mesh, target.placements,
                                      src_data_rank=None)  # which all ranks have: none is sent
        target.copy_(value)


def save(model: Checkpoint, folder: Path, ranks: Ranks) -> str:
    """Save the model as the checkpoint `folder`, from the first rank; the digest ("" on the others,
    which take part in gathering sharded tensors, one by one)."""
    if not _sharded(model.network):
        model = model.with_network(model.network.cpu())
        if ranks.first:
            model.save(folder)
        return model.digest if ranks.first else ""
    gather = _Gather(model.network, ranks)
    if not ranks.first:
        gather.take_part()
        return ""
    passthrough = model.origin.passthrough if model.origin else {}
    try:
        model.save(folder, {**gather.tensors(), **passthrough})
    finally:
        gather.end()
    return read(folder, device="meta").digest


def _sharded(network: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


class _Gather:
    """Sharded tensors, gathered one by one as the first rank loads them."""

    def __init__(self, network: Any, ranks: Ranks) -> None:
        self._network, self._ranks, self._state = network, ranks, network.state_dict()
        self._last: dict[str, dict[str, Tensor]] = {}

    def tensors(self) -> dict[str, Stored]:
        """All by their names in files."""
        tied = state_dict.ties(self._network)
        return {part: Stored(part, Path(), 0, view.dtype, tuple(view.shape),
                             load=partial(self._load, name, part))
                for name, tensor in self._state.items() if name not in tied
                for part, view in state_dict.split(
                    self._network, name, torch.empty_like(tensor, device="meta")).items()}

    def _load(self, name: str, part: str) -> Tensor:
        if name not in self._last:
            if len(self._last) == 2:  # files hold the pieces of two stacks of experts by turns
                self._last.pop(next(iter(self._last)))
            full = self._full(name)
            assert full is not None
            self._last[name] = state_dict.split(self._network, name, full.cpu())
        return self._last[name][part]

    def _full(self, name: str | None) -> Tensor | None:
        """On all ranks together: the tensor that the first rank names; None when it names none."""
        names = [name]
        dist.broadcast_object_list(names, device=self._ranks.device)
        if names[0] is None:
            return None
        tensor = self._state[names[0]]
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def take_part(self) -> None:
        """On other ranks than the first: until it is done."""
        while self._full(None) is not None:
            pass

    def end(self) -> None:
        """On the first rank: let the others go on."""
        self._full(None)
