"""Tiny networks and batches that the tests of training share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vicugna import models
from vicugna.training.batch import TrainingBatch
from vicugna.training.recipe import OptimiserSpec, TrainSpec

VOCAB = 40


def network(kind: str = "vicugna", seed: int = 0, **other: Any) -> nn.Module:
    """Two layers of width 16; the weights follow from the seed."""
    config = {"model_type": kind, "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24,
              "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
              "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": True, **other}
    if kind == "vicugna":
        config.setdefault("sliding_window", 6)
    made = models.build(config)
    models.initialise(made, seed)
    return made


def spec(**other: Any) -> TrainSpec:
    """Eight steps in float32, checkpoints at 3 and 6."""
    optimiser = {"warmup": 2, **other.pop("optimiser", {})}
    return TrainSpec(**{"steps": 8, "rows": 4, "sequence_length": 16, "precision": "fp32",
                        "checkpoint_every": 3, "sources": ({"source": "stdlib"},),
                        "optimiser": OptimiserSpec(**optimiser), **other})


def batch(step: int, rank: int = 0, world: int = 1, rows: int = 4, T: int = 16) -> TrainingBatch:
    """Rows of the step, a function of it alone, that the ranks share; two documents a row."""
    random = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (rows, T + 1), generator=random)
    weights = (torch.rand(rows, T, generator=random) < 0.7).float()
    positions = torch.cat([torch.arange(5), torch.arange(T - 5)]).expand(rows, T)
    own = slice(rank * rows // world, (rank + 1) * rows // world)
    return TrainingBatch(tokens[own, :-1], positions[own], tokens[own, 1:], weights[own],
                         float(weights.sum()))


def stopping_at(step: int, batches: Callable[[int], TrainingBatch] = batch
                ) -> Callable[[int], TrainingBatch]:
    """`batches`, until a step at which the process dies."""
    def one(now: int) -> TrainingBatch:
        if now == step:
            raise KeyboardInterrupt
        return batches(now)
    return one
