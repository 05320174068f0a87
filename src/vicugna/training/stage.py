"""One training stage: the model it starts from, what it is trained with, and what it leaves."""

from datetime import date as Date
from pathlib import Path
from typing import Any

import vicugna
from vicugna import models
from vicugna.distributed import Ranks
from vicugna.model import Model
from vicugna.tokenizer import Tokenizer
from vicugna.training import cost, parallel, rollouts, supervised
from vicugna.training.objectives import policy_gradient
from vicugna.training.recipe import ModelSpec, RlSpec, TrainSpec
from vicugna.training.trainer import train


def start(spec: ModelSpec, tokenizer: Tokenizer, seed: int, ranks: Ranks) -> Model:
    """The model that a recipe's first training stage starts from: the checkpoint `spec.start`, or
    a new network."""
    if spec.start is not None:
        return vicugna.load(spec.start)
    config = spec.config(tokenizer.vocab_size)
    if ranks.device.type == "cpu":
        cost.check_size(config)
    network = models.build(config)
    models.initialise(network, seed)
    return Model(network, tokenizer)


def train_stage(model: Model, spec: TrainSpec | RlSpec, seed: int, folder: Path, cache: Path,
                name: str, ranks: Ranks, date: Date) -> tuple[str, dict[str, Any]]:
    """Train `model` by `spec` and save it as folder/checkpoint; its digest ("" on all ranks but
    the first), and what it cost. `date` is the day that a chat template may ask for."""
    network, tok = model.network, model.tokenizer
    assert tok is not None
    if isinstance(spec, RlSpec):
        spent = train(network, policy_gradient,
                      lambda step: rollouts.rollout(network, tok, spec, seed, step, ranks, date),
                      spec, folder, name, ranks)
    else:
        spent = supervised.from_data(network, tok, spec, seed, folder, cache, name, ranks, date)
    trained = model.with_network(parallel.whole(network))
    if ranks.first:
        trained.save(folder / "checkpoint")
    return trained.digest if ranks.first else "", spent
