"""One training stage: the model it starts from, what it is trained with, and what it leaves."""

from datetime import date as Date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vicugna import models
from vicugna.distributed import Ranks
from vicugna.model import Model
from vicugna.tokenizer import Tokenizer
from vicugna.training import parallel, rollouts, supervised
from vicugna.training.objectives import next_token, policy_gradient
from vicugna.training.recipe import ModelSpec, RlSpec, TrainSpec
from vicugna.training.trainer import train


def new_model(spec: ModelSpec, tokenizer: Tokenizer) -> Model:
    """The model of a recipe that starts from no checkpoint, its network on the meta device."""
    with torch.device("meta"):
        return Model(models.build(spec.config(tokenizer.vocab_size)), tokenizer)


def train_stage(model: Model, spec: TrainSpec | RlSpec, seed: int, folder: Path, cache: Path,
                name: str, ranks: Ranks, date: Date) -> tuple[str, dict[str, Any]]:
    """Train `model` by `spec` and save it as folder/checkpoint: its digest ("" on all ranks but the
    first), and what it cost. `date` is the day that a chat template may ask for.

    Its network is on the meta device. It gets the values of the checkpoint that it was read from,
    or if there is none, is initialised from `seed`."""
    network, tok = model.network, model.text_tokenizer()
    assert next(network.parameters()).is_meta
    values = (model.origin.stream() if model.origin and model.origin.stream else
              models.initial_values(network, seed))
    if isinstance(spec, RlSpec):
        rollout = partial(rollouts.rollout, network, tok, spec, seed, ranks=ranks, date=date)
        cost = train(network, policy_gradient, rollout, spec, folder, name, ranks, values=values)
    else:
        batches, validate = supervised.batches(network, tok, spec, seed, folder, cache,
                                               f"stages.{name}", ranks, date)
        cost = train(network, next_token, batches, spec, folder, name, ranks, validate, values)
    return parallel.save(model, folder / "checkpoint", ranks), cost
