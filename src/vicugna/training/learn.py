"""Learning from data: the trainer over a stream of texts and chats."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from vicugna import data, models
from vicugna.data import IGNORED, Batch, Stream
from vicugna.distributed import Ranks
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer
from vicugna.training import cost
from vicugna.training.recipe import TrainSpec
from vicugna.training.trainer import WeightedBatch, padding, train


def from_data(network: nn.Module, tokenizer: Tokenizer, spec: TrainSpec, seed: int, folder: Path,
              cache: Path, where: str, ranks: Ranks) -> dict[str, Any]:
    """Pretraining and fine-tuning: next-token loss on `spec.sources`, a mean over the step's
    targets on all ranks. Returns trainer.train's cost."""
    config: Any = network.config
    check_length(spec.sequence_length, config.context_length, where)
    if ranks.device.type == "cpu":
        rows = spec.micro_rows or -(-spec.rows // ranks.world)
        element = 2 if spec.precision == "bf16" else 4
        cost.check_memory(network, rows, spec.sequence_length, element, where)
    opened = partial(data.open_stream, spec.sources, tokenizer, spec.sequence_length, seed, cache,
                     pad=padding(tokenizer, network))
    stream, coming = opened(), None

    def batch_of(step: int) -> WeightedBatch:
        nonlocal coming
        if ranks.device.type == "cpu":  # another thread would take the cores that train
            batch = _weighted(stream.batch(step, spec.rows, ranks.rank, ranks.world))
        else:
            coming = coming or stream.batches(step, spec.rows, ranks.rank, ranks.world)
            batch = _weighted(next(coming))
        batch.norm = max(1.0, ranks.total(batch.norm)[0])
        return batch

    validate = _validation(opened("dev"), spec, ranks) if spec.validation_rows else None
    return train(network, batch_of, spec, folder, where, ranks, validate)


def check_length(length: int, context: int, where: str) -> None:
    """Raise VicugnaError when training sequences are longer than the context."""
    if length > context:
        raise VicugnaError(f"sequences of {length} tokens, but the context holds {context}",
                           f"{where}.sequence_length",
                           "Shorten the sequences, or raise model.context")


def _validation(stream: Stream, spec: TrainSpec, ranks: Ranks
                ) -> Callable[[nn.Module, int], dict[str, float]]:
    """What notes `validation_loss`, on rows never trained on, every `validate_every` steps."""
    count = -(-spec.validation_rows // ranks.world)  # on each rank: FSDP2 gathers weights for each
    rows = [_weighted(stream.batch(ranks.rank + n * ranks.world, 1)) for n in range(count)]
    if ranks.rank + (count - 1) * ranks.world >= spec.validation_rows:
        rows[-1].weights_BT.zero_()
        rows[-1].norm = 0.0

    @torch.no_grad()
    def validate(module: nn.Module, step: int) -> dict[str, float]:
        if (step + 1) % spec.validate_every and step + 1 != spec.steps:
            return {}
        mine = sum(float(module(*batch.inputs(ranks.device))) for batch in rows)
        loss, count = ranks.total(mine, sum(batch.norm for batch in rows))
        return {"validation_loss": loss / max(1.0, count)}

    return validate


def _weighted(batch: Batch) -> WeightedBatch:
    """Every target weighs 1; `norm` is their number in this batch."""
    weights_BT = (batch.targets_BT != IGNORED).float()
    return WeightedBatch(batch.tokens_BT, batch.positions_BT, batch.targets_BT.clamp(min=0),
                         weights_BT, float(weights_BT.sum()), {})


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
