"""How a network is placed: compiled on a GPU, whole on each (DDP), or sharded over all (FSDP2)."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vicugna.checkpoint import Checkpoint, read, state_dict
from vicugna.checkpoint.hf import weights
from vicugna.distributed import Ranks
from vicugna.errors import VicugnaError
from vicugna.files import disk_errors
from vicugna.memory import lower_mmap_threshold
from vicugna.models.layers import flex
from vicugna.models.layers.moe import Experts
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
            lower_mmap_threshold()
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
    # First each into a file of its own: a checkpoint's files have another order than the network.
    tied, naming = state_dict.ties(model.network), state_dict.names_of(model.network)
    with (disk_errors(folder), TemporaryDirectory(
            prefix=".gathered.", suffix=".tmp", dir=folder.parent) as temporary):
        for name, tensor in model.network.state_dict().items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if ranks.first and name not in tied:
                part = Path(temporary, name)
                part.mkdir()
                weights.write(part, state_dict.split(naming, name, full.cpu()))
        if not ranks.first:
            return ""
        model.save(folder, {**weights.scan(Path(temporary).rglob("*.safetensors")),
                            **(model.origin.passthrough if model.origin else {})})
    return read(folder, device="meta").digest


def compile_layers(network: Any, device: torch.device) -> None:
    """Compile the network's decoder layers where that is quicker: on a GPU with a working compiler
    (see layers/flex.py). Layers of experts are left out: their shapes change with the routing."""
    if flex.kernel(device) is not None:
        for layer in network.model.layers:
            if not any(isinstance(module, Experts) for module in layer.modules()):
                compile_in_place(layer)


def compile_in_place(layer: nn.Module) -> None:
    """Let a layer run compiled while it is in training mode: roll-outs and validation have other
    shapes. Only `forward` is replaced, so that names and hooks, FSDP2's too, stay as they are."""
    eager: Callable[..., Any] = layer.forward
    compiled = torch.compile(eager)

    def forward(*inputs: Any) -> Any:
        return compiled(*inputs) if layer.training else eager(*inputs)

    layer.forward = forward


def _sharded(network: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())
