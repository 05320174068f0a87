"""The training stages: a trainer over a stream of data, or over the network's own answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from vicugna import data, models
from vicugna.data import IGNORED, Batch, Stream
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer
from vicugna.training import cost, grpo
from vicugna.training.parallel import Ranks
from vicugna.training.recipe import RlSpec, TrainSpec
from vicugna.training.trainer import WeightedBatch, train


def from_data(network: nn.Module, tokenizer: Tokenizer, spec: TrainSpec, seed: int, folder: Path,
              cache: Path, where: str, ranks: Ranks) -> dict[str, Any]:
    """Pretraining and fine-tuning: next-token loss on `spec.sources`. Returns trainer.train's cost.

    Every rank makes the whole step's targets count, so that the loss is a mean over all of them.
    """
    config: Any = network.config
    check_length(spec.sequence_length, config.max_position_embeddings, where)
    element = 2 if spec.precision == "bf16" else 4
    rows = spec.micro_rows or -(-spec.rows // ranks.world)
    if ranks.device.type == "cpu":
        cost.check_memory(network, rows, spec.sequence_length, element, where)
    stream = open_stream(tokenizer, spec, seed, cache)
    coming = None

    def batch_of(step: int) -> WeightedBatch:
        nonlocal coming
        if coming is None:
            coming = stream.batches(step, spec.rows, ranks.rank, ranks.world)
        batch = next(coming)
        weights_BT = (batch.targets_BT != IGNORED).float()
        return WeightedBatch(batch.tokens_BT, batch.positions_BT, batch.targets_BT.clamp(min=0),
                             weights_BT, max(1.0, ranks.total(float(weights_BT.sum()))[0]), {})

    return train(network, batch_of, spec, folder, where, ranks,
                 _validation(tokenizer, spec, seed, cache, ranks))


def check_length(sequence_length: int, context: int, where: str) -> None:
    """Raise VicugnaError when training sequences are longer than the context."""
    if sequence_length > context:
        raise VicugnaError(
            f"sequences of {sequence_length} tokens, but the context holds {context}",
            f"{where}.sequence_length", "Shorten the sequences, or raise model.context")


def open_stream(tokenizer: Tokenizer, spec: TrainSpec, seed: int, cache: Path,
                split: str = "train") -> Stream:
    """The stage's stream of data."""
    return data.open_stream(spec.sources, tokenizer, spec.sequence_length, seed, cache, split)


def _validation(tokenizer: Tokenizer, spec: TrainSpec, seed: int, cache: Path,
                ranks: Ranks) -> Callable[[nn.Module, int], dict[str, float]]:
    """What notes `validation_loss`, on rows never trained on, every `validate_every` steps."""
    if not spec.validation_rows:
        return lambda module, step: {}
    stream = open_stream(tokenizer, spec, seed, cache, "dev")
    rows = []
    for row in range(ranks.rank, spec.validation_rows + -spec.validation_rows % ranks.world,
                     ranks.world):  # as many on each rank, for FSDP2 gathers weights at each
        rows.append(stream.batch(row, 1))
        if row >= spec.validation_rows:
            rows[-1].targets_BT.fill_(IGNORED)

    @torch.no_grad()
    def validate(module: nn.Module, step: int) -> dict[str, float]:
        if (step + 1) % spec.validate_every and step + 1 != spec.steps:
            return {}
        mine = [loss_of(module, batch, ranks) for batch in rows]
        loss, count = ranks.total(sum(loss for loss, _ in mine), sum(n for _, n in mine))
        return {"validation_loss": loss / max(1.0, count)}

    return validate


def loss_of(objective: nn.Module, batch: Batch, ranks: Ranks) -> tuple[float, float]:
    """Summed loss and number of targets of a batch."""
    weights_BT = (batch.targets_BT != IGNORED).float()
    loss = objective(*(x.to(ranks.device) for x in (
        batch.tokens_BT, batch.positions_BT, batch.targets_BT.clamp(min=0), weights_BT)))
    return float(loss), float(weights_BT.sum())


def from_rewards(network: nn.Module, tokenizer: Tokenizer, spec: RlSpec, seed: int, folder: Path,
                 where: str, ranks: Ranks) -> dict[str, Any]:
    """Reinforcement learning on `spec.tasks`. Returns trainer.train's cost."""
    grpo.check(spec.tasks, spec.parallel)
    return train(network, lambda step: grpo.rollout(network, tokenizer, spec, seed, step, ranks),
                 spec, folder, where, ranks)


def whole(network: nn.Module) -> nn.Module:
    """The network with whole tensors in this process's memory; FSDP2's shards are gathered (on
    the first rank, which is the one that writes)."""
    if not any(isinstance(p, DTensor) for p in network.parameters()):
        return network.cpu()
    state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True,
                                                                   cpu_offload=True))
    config: Any = network.config
    fresh = models.build(config.to_dict())
    if state:
        fresh.load_state_dict(state)
    return fresh
