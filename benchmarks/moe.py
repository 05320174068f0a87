"""A mixture of experts, forward alone and with the backward pass: `layers.moe.routed` against
transformers' experts (eager and grouped, the quicker of the two), and against the time of the same
number of multiplications in one dense SwiGLU.

    python benchmarks/moe.py [--rounds 7] [--device cpu] [--dtype bfloat16]

Prints a table and, last, one JSON line. `ratio` is transformers' median time over ours, in
interleaved rounds; `limit` is the dense SwiGLU's over ours. It would be 1 if routing cost nothing,
and is more than can be had, since experts are more weights to read and more gradients to write.
`speedup` in the JSON line is the smallest ratio, `limit` the smallest of those with 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from vicugna.models.layers.moe import routed

SHAPES = {  # width, an expert's width, experts, of them chosen
    "Mixtral-like, 2 of 8": (1024, 1792, 8, 2),
    "DeepSeek-like, 8 of 64": (1024, 320, 64, 8),
    "Llama-4-like, 1 of 16": (1024, 1024, 16, 1),
}
TOKENS = 1, 512
Step = Callable[[], Tensor]


def steps(shape: tuple[int, int, int, int], N: int, device: str, dtype: torch.dtype
          ) -> tuple[dict[str, Step], list[Tensor]]:
    """What is timed, by name, and the tensors that have gradients."""
    D, width, E, k = shape
    config = MixtralConfig(hidden_size=D, intermediate_size=width, num_local_experts=E,
                           num_experts_per_tok=k)
    experts: dict[str, Any] = {}
    gate_up = torch.randn(E, 2 * width, D, device=device, dtype=dtype).mul_(D**-0.5)
    down = torch.randn(E, D, width, device=device, dtype=dtype).mul_(width**-0.5)
    for name in ("eager", "grouped_mm"):
        config._experts_implementation = name
        experts[name] = MixtralExperts(config)
        experts[name].gate_up_proj = torch.nn.Parameter(gate_up)
        experts[name].down_proj = torch.nn.Parameter(down)
        config = MixtralConfig(**config.to_dict())
    x = torch.randn(N, D, device=device, dtype=dtype, requires_grad=True)
    weight, chosen = torch.rand(N, E, device=device).softmax(-1).topk(k, dim=-1)
    weight = weight.to(dtype)
    ours = [gate_up.clone().requires_grad_(), down.clone().requires_grad_()]
    one = [gate_up[0].clone().requires_grad_(), down[0].clone().requires_grad_()]
    repeated = x.detach().repeat_interleave(k, dim=0).requires_grad_()

    def dense() -> Tensor:
        gate, up = F.linear(repeated, one[0]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, one[1])

    leaves = [x, repeated, *ours, *one,
              *(weight for each in experts.values() for weight in each.parameters())]
    return {"eager": lambda: experts["eager"](x, chosen, weight),
            "grouped_mm": lambda: experts["grouped_mm"](x, chosen, weight),
            "ours": lambda: routed(x, chosen, weight, ours[0], ours[1]), "dense": dense}, leaves


def seconds(step: Step, backward: bool, leaves: list[Tensor]) -> float:
    for leaf in leaves:
        leaf.grad = None
    wait = torch.cuda.synchronize if leaves[0].is_cuda else lambda: None
    wait()
    begun = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = step()
        if backward:
            out.backward(torch.ones_like(out))
    wait()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    torch.manual_seed(0)
    ratios, limits = {}, {}
    print(f"{'shape':24} {'tokens':>6} {'':>9} {'eager ms':>9} {'grouped ms':>10} {'ours ms':>8} "
          f"{'dense ms':>8} {'ratio':>6} {'limit':>6}")
    for name, shape in SHAPES.items():
        for N, backward in ((TOKENS[0], False), (TOKENS[1], False), (TOKENS[1], True)):
            timed, leaves = steps(shape, N, options.device, getattr(torch, options.dtype))
            rounds = [{what: seconds(step, backward, leaves) for what, step in timed.items()}
                      for _ in range(options.rounds + 2)][2:]
            ms = {what: 1e3 * statistics.median(one[what] for one in rounds) for what in timed}
            ratio, limit = min(ms["eager"], ms["grouped_mm"]) / ms["ours"], ms["dense"] / ms["ours"]
            key = f"{name}, {N} tokens{', backward' * backward}"
            ratios[key], limits[key] = round(ratio, 2), round(limit, 2)
            print(f"{name:24} {N:6} {'backward' * backward:>9} {ms['eager']:9.2f} "
                  f"{ms['grouped_mm']:10.2f} {ms['ours']:8.2f} {ms['dense']:8.2f} {ratio:6.2f} "
                  f"{limit:6.2f}", flush=True)
    print(json.dumps({
        "benchmark": "moe", "speedup": min(ratios.values()),
        "limit": min(limit for key, limit in limits.items() if "512" in key), "ratios": ratios,
        "limits": limits, "device": options.device, "dtype": options.dtype,
        "rounds": options.rounds, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "torch": torch.__version__}))


if __name__ == "__main__":
    main()
