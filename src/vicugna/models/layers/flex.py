"""Block-sparse attention on CUDA: PyTorch's FlexAttention (arXiv 2412.05496), compiled."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # queries, and keys, of a block that is computed or skipped as a whole


@cache
def kernel(device: torch.device) -> Callable[..., Any] | None:
    """FlexAttention compiled; None where it cannot be: it needs a GPU of compute capability 8.0,
    Triton and a C compiler, and TORCH_COMPILE_DISABLE=1 turns it off."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    from torch._dynamo import config  # heavy, and needed on CUDA only
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if config.disable or not compiler or not importlib.util.find_spec("triton"):
        return None
    return torch.compile(flex_attention)


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether heads are wide enough for Triton's matrix products."""
    return min(q.shape[-1], v.shape[-1]) >= 16


def block_mask(first_BT: Tensor) -> BlockMask:
    """The mask of queries that attend from key `first_BT` to themselves, by blocks: (T / 128)^2
    numbers, never T * T."""
    B, T = first_BT.shape
    n = -(-T // BLOCK)
    last_BR = first_BT[:, -1:].expand(B, n * BLOCK - T)
    first_BnQ = torch.cat([first_BT, last_BR], dim=1).view(B, n, BLOCK)
    query_n1 = torch.arange(n, device=first_BT.device)[:, None]
    key_n = query_n1[:, 0]
    least_Bn1, most_Bn1 = first_BnQ.amin(-1, keepdim=True), first_BnQ.amax(-1, keepdim=True)
    some_Bnn = (key_n <= query_n1) & (least_Bn1 < (key_n + 1) * BLOCK)
    full_Bnn = (key_n < query_n1) & (most_Bn1 <= key_n * BLOCK) & ((query_n1 + 1) * BLOCK <= T)

    def mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first_BT[b, query])

    return BlockMask.from_kv_blocks(*_listed(some_Bnn & ~full_Bnn), *_listed(full_Bnn), BLOCK, mask,
                                    seq_lengths=(T, T))


def _listed(blocks_Bnn: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has [B, 1, n], and their indices first [B, 1, n, n]."""
    order = blocks_Bnn.int().argsort(dim=-1, descending=True, stable=True)
    return blocks_Bnn.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]
