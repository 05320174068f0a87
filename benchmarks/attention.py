"""Causal attention of training, forward and backward: `Dense` against PyTorch's own kernel.

    python benchmarks/attention.py [--rounds 7]

Prints a table and, last, one JSON line. `ratio` is the smallest over the shapes of the median time
of scaled_dot_product_attention over the median time of `Dense`, in interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vicugna.models.layers.attention import Dense
from vicugna.models.layers.mask import Span

SHAPES = {  # rows, tokens, query heads, key/value heads, head width
    "8 x 512, 3/3 heads of 64": (8, 512, 3, 3, 64),
    "4 x 512, 8/4 heads of 64": (4, 512, 8, 4, 64),
    "2 x 1024, 8/4 heads of 64": (2, 1024, 8, 4, 64),
}


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Dense()(0, q, k, v, Span())


def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def seconds(attention: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> float:
    begun = time.perf_counter()
    attention(*inputs).sum().backward()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    ratios = {}
    print(f"{'shape':28} {'kernel ms':>10} {'Dense ms':>10} {'ratio':>6}")
    for name, (B, T, H, G, K) in SHAPES.items():
        inputs = [torch.randn(B, T, heads, K, dtype=torch.bfloat16, requires_grad=True)
                  for heads in (H, G, G)]
        times = [(seconds(kernel, inputs), seconds(dense, inputs)) for _ in range(rounds + 1)][1:]
        theirs, ours = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        ratios[name] = round(theirs / ours, 2)
        print(f"{name:28} {theirs:10.1f} {ours:10.1f} {theirs / ours:6.2f}")
    print(json.dumps({"benchmark": "attention", "ratio": min(ratios.values()), "ratios": ratios,
                      "threads": torch.get_num_threads(), "cores": os.cpu_count(),
                      "torch": torch.__version__}))


if __name__ == "__main__":
    main()
