"""Pretraining and supervised fine-tuning: the trainer over a stream of texts and chats."""

import sys
from datetime import date as Date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vicugna import data, files
from vicugna.data import Batch, Stream
from vicugna.distributed import Ranks
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer
from vicugna.training import cost
from vicugna.training.batch import TrainingBatch, padding
from vicugna.training.recipe import TrainSpec
from vicugna.training.trainer import Batches, Validate


def batches(network: nn.Module, tokenizer: Tokenizer, spec: TrainSpec, seed: int, folder: Path,
            cache: Path, where: str, ranks: Ranks, date: Date | None = None
            ) -> tuple[Batches, Validate | None]:
    """This rank's batch of each step from `spec.sources`, for objectives.next_token as a mean over
    the step's targets on all ranks; and the validation, if there is one. `date` is the day that a
    chat template may ask for. VicugnaError for what cannot be trained."""
    config: Any = network.config
    check_length(spec.sequence_length, config.context_length, where)
    if ranks.device.type == "cpu":
        rows = spec.micro_rows or -(-spec.rows // ranks.world)
        element = 2 if spec.precision == "bf16" else 4
        cost.check_memory(network, rows, spec.sequence_length, element, where,
                          ranks.world if spec.parallel == "fsdp" else 1)
    opened = partial(data.open_stream, spec.sources, tokenizer, spec.sequence_length, seed, cache,
                     pad=padding(tokenizer, network), date=date)
    stream, prefetched = opened(), None
    if ranks.first and spec.kind == "sft":
        warn_of_plain_text(stream, where, folder)

    def batch_of(step: int) -> TrainingBatch:
        nonlocal prefetched
        if ranks.device.type == "cpu":  # another thread would take the cores that train
            batch = _counted(stream.batch(step, spec.rows, ranks.rank, ranks.world))
        else:
            prefetched = prefetched or stream.batches(step, spec.rows, ranks.rank, ranks.world)
            batch = _counted(next(prefetched))
        batch.norm = max(1.0, ranks.total(batch.norm)[0])
        return batch

    return batch_of, _validation(opened("dev"), spec, ranks) if spec.validation_rows else None


def warn_of_plain_text(stream: Stream, where: str, folder: Path) -> None:
    """Say, and write to folder/warnings.txt, which of the sources are plain text: it is learned as
    it is, without the form of a chat."""
    lines = [f"warning: {where}: {source} is plain text, not chats: all of it is learned, without "
             "the chat template" for source in stream.plain_text]
    if lines:
        print(*lines, sep="\n", file=sys.stderr)
        files.write_text(folder / "warnings.txt", "\n".join([*lines, ""]))


def check_length(length: int, context: int, where: str) -> None:
    """Raise VicugnaError when training sequences are longer than the context."""
    if length > context:
        raise VicugnaError(f"sequences of {length} tokens, but the context holds {context}",
                           f"{where}.sequence_length",
                           "Shorten the sequences, or raise model.context")


def _validation(stream: Stream, spec: TrainSpec, ranks: Ranks) -> Validate:
    """Gives `validation_loss`, on rows never trained on, every `validate_every` steps."""
    count = -(-spec.validation_rows // ranks.world)  # on each rank: FSDP2 gathers weights for each
    rows = [_counted(stream.batch(ranks.rank + n * ranks.world, 1)) for n in range(count)]
    if ranks.rank + (count - 1) * ranks.world >= spec.validation_rows:
        rows[-1].weights_BT.zero_()
        rows[-1].norm = 0.0

    @torch.no_grad()
    def validate(module: nn.Module, step: int) -> dict[str, float]:
        if (step + 1) % spec.validate_every and step + 1 != spec.steps:
            return {}
        own = sum(float(module(batch.part(slice(None), ranks.device))) for batch in rows)
        loss, count = ranks.total(own, sum(batch.norm for batch in rows))
        return {"validation_loss": loss / max(1.0, count)}

    return validate


def _counted(batch: Batch) -> TrainingBatch:
    """Its `norm` is the number of targets in this batch."""
    return TrainingBatch(**vars(batch), norm=float(batch.weights_BT.sum()))
