"""Causal attention patterns, and the masks made of them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """The earlier positions that a layer attends to: all of them, a sliding `window` (a token and
    the window - 1 before it), or those of the token's own `chunk`: positions n * chunk to
    (n + 1) * chunk - 1."""

    window: int | None = None
    chunk: int | None = None

    def first_key(self, query: Tensor, start: Tensor) -> Tensor:
        """Index of the first key that the query of index `query` attends to, in a sequence that
        starts at index `start`. Shapes broadcast."""
        first = start
        if self.chunk is not None:
            first = start + (query - start).clamp(min=0) // self.chunk * self.chunk
        if self.window is not None:
            first = torch.maximum(first, query - self.window + 1)
        return first

    def mask(self, query: Tensor, key: Tensor, start: Tensor) -> Tensor:
        """Boolean mask [..., t, s] of queries [..., t] against keys [..., s], given as indices:
        each attends from its first key to itself."""
        first, key = self.first_key(query, start), key[..., None, :]
        return (key <= query[..., None]) & (key >= first[..., None])


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a boolean mask is true, -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, float("-inf"))
