"""What one process trains on in one step."""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from vicugna.data import Batch
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer


@dataclass
class TrainingBatch(Batch):
    """This process's rows of one step. An objective that needs more (which rows are a pair,
    pictures) adds it in a subclass: every tensor [B, ...] of it is split and moved along."""

    norm: float = 1.0  # what the loss, summed over all processes, is divided by
    metrics: dict[str, float] = field(default_factory=dict)  # for metrics.jsonl

    def part(self, rows: slice, device: torch.device) -> Self:
        """Those rows, on `device`."""
        tensors: Any = {name: value[rows].to(device) for name, value in vars(self).items()
                        if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def check(self, network: Any, where: str) -> None:
        """Raise VicugnaError for a token without an embedding."""
        largest = max(int(self.tokens_BT.max()), int(self.targets_BT.max()))
        if largest >= network.config.vocab_size:
            raise VicugnaError(f"the data contain token {largest}, but the model's vocab_size is "
                               f"{network.config.vocab_size}", where, "Use the tokenizer that the "
                               "checkpoint was made with, or leave out what was added to it")


def padding(tokenizer: Tokenizer, network: Any) -> int:
    """The token that pads rows: the tokenizer's, or 0 if the network has no embedding of it, as
    when it was added to a tokenizer alone."""
    return tokenizer.pad_id if tokenizer.pad_id < network.config.vocab_size else 0
