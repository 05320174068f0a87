"""Products with packed weights on this CPU: the share of the read bandwidth at one token, and the
speed at many beside PyTorch's `linear`.

    python benchmarks/cpu_products.py [--rounds 7] [--kinds q4_0 q8_0 bf16 f32]

Prints tables and, last, one JSON line. Rounds are interleaved; figures are medians. Weights of one
token's products are 256 MB in all, so that they come from memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from vicugna.engine.cpu import linear
from vicugna.engine.cpu import vectors as v
from vicugna.engine.cpu.arena import ARENA
from vicugna.engine.cpu.compiler import Operation
from vicugna.engine.cpu.product import share
from vicugna.engine.cpu.threads import Instruction, program, run

MEMORY = 256 << 20  # bytes read in a round
DECODE = [(8192, 2048), (2048, 8192), (1536, 576)]  # N, K
PREFILL = [(2048, 2048), (512, 192), (192, 192)]
TOKENS = (1, 16, 64, 512)


@Operation
def read(operands: int, thread: int, threads: int) -> None:
    """Read memory, each thread a contiguous part: the bandwidth that there is."""
    start, size, out = v.unpack(operands, 3)
    first, last = share(size // 1024, thread, threads)
    a, b = v.splat(0.0), v.splat(0.0)
    for at in range(start + first * 1024, start + last * 1024, 8 * v.L):
        a, b = a + v.load_f32(at), b + v.load_f32(at + 4 * v.L)
    v.store_f32(out + thread * 256, a + b)


def medians(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, in interleaved rounds after a first one."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, case in cases.items():
            begun = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def multiply(x: torch.Tensor, matrices: list[linear.Packed]) -> None:
    for packed in matrices:
        linear.matmul(x, packed)


def decode(kinds: list[str], rounds: int) -> dict[str, float]:
    """Shares of the read bandwidth at one token."""
    memory = ARENA.allocate(MEMORY)
    memory[:] = 1
    out = torch.empty(64 * torch.get_num_threads())
    roof = program([Instruction(read, (memory.ctypes.data, MEMORY, out.data_ptr()))])
    shares = {}
    print(f"{'one token':24}{'GB/s':>8}{'share':>8}")
    for N, K in DECODE:
        cases: dict[str, Callable[[], object]] = {"read": partial(run, roof)}
        sizes = {"read": float(MEMORY)}
        for kind in kinds:
            one = linear.pack(torch.randn(N, K), kind)
            copies = [one, *(linear.pack(torch.randn(N, K), kind)
                             for _ in range(MEMORY // one.nbytes - 1))]
            cases[kind] = partial(multiply, torch.randn(1, K), copies)
            sizes[kind] = float(one.nbytes * len(copies))
        rates = {name: sizes[name] / s for name, s in medians(cases, rounds).items()}
        for name, rate in rates.items():
            shares[f"{N}x{K} {name}"] = round(rate / rates["read"], 3)
            print(f"{N}x{K} {name:12}".ljust(24) + f"{rate / 1e9:8.1f}{rate / rates['read']:8.0%}")
    return shares


def prefill(kinds: list[str], rounds: int) -> dict[str, float]:
    """How many times as fast as `linear` in the same dtype, or in bfloat16 for blocks."""
    ratios = {}
    print(f"\n{'tokens':36}{'us':>10}{'GFLOP/s':>10}{'times linear':>14}")
    for N, K in PREFILL:
        weight = torch.randn(N, K)
        for M in TOKENS:
            x = torch.randn(M, K)
            cases: dict[str, Callable[[], object]] = {
                "linear f32": partial(F.linear, x, weight),
                "linear bf16": partial(F.linear, x.bfloat16(), weight.bfloat16())}
            for kind in kinds:
                cases[kind] = partial(linear.matmul, x, linear.pack(weight, kind))
            seconds = medians(cases, rounds)
            for name, s in seconds.items():
                peer = seconds["linear f32" if name == "f32" else "linear bf16"]
                ratios[f"{N}x{K} {M} {name}"] = round(peer / s, 2)
                print(f"{N}x{K}, {M} tokens, {name}".ljust(36)
                      + f"{s * 1e6:10.0f}{2e-9 * M * N * K / s:10.0f}{peer / s:14.2f}")
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kinds", nargs="+", default=["q4_0", "q8_0", "bf16", "f32"])
    given = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        shares, ratios = (part(given.kinds, given.rounds) for part in (decode, prefill))
    print(json.dumps({"benchmark": "cpu_products", "share_of_bandwidth": shares,
                      "times_linear": ratios, "instructions": v.SET.name,
                      "threads": torch.get_num_threads(), "cores": os.cpu_count(),
                      "torch": torch.__version__}))


if __name__ == "__main__":
    main()
