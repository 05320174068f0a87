"""Modules over packed matrices, in the place of a network's own."""

from typing import Any

import torch
from torch import Tensor, nn

from vicugna.engine.cpu import linear
from vicugna.models.layers.moe import Experts


class PackedLinear(nn.Module):
    """x -> x @ W.T + bias in x's dtype, for a packed matrix W [N, K]. The result of a row has the
    same bits whatever else is in the batch."""

    def __init__(self, packed: linear.Packed, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.packed, self.bias = packed, bias
        self.out_features, self.in_features = packed.shape

    def forward(self, x: Tensor) -> Tensor:
        y_MN = linear.matmul(x.reshape(-1, self.in_features), self.packed, self.bias)
        return y_MN.view(*x.shape[:-1], self.out_features)


class PackedEmbedding(nn.Module):
    """Token ids -> rows of a packed matrix [V, D], decoded to `dtype` each time."""

    def __init__(self, packed: linear.Packed, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed, self.dtype = packed, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return linear.rows(self.packed, tokens).to(self.dtype)


def put(network: nn.Module, name: str, made: list[linear.Packed], dtype: torch.dtype,
        tied: dict[str, str]) -> None:
    """Let packed matrices (of a stack of experts one for each) stand for the parameter `name`, and
    for those that are `tied` to it; embeddings are decoded to `dtype`."""
    for one in (name, *(other for other, first in tied.items() if first == name)):
        path, _, last = one.rpartition(".")
        module: Any = network.get_submodule(path)
        if isinstance(module, Experts):
            delattr(module, last)
            setattr(module, last, nn.ModuleList(map(PackedLinear, made)))
            continue
        outer, _, attribute = path.rpartition(".")
        setattr(network.get_submodule(outer), attribute,
                PackedEmbedding(made[0], dtype) if isinstance(module, nn.Embedding)
                else PackedLinear(made[0], module.bias))
