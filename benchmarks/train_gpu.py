"""Training on one GPU at the shape of Llama 3.2 1B, rows of 4,096 tokens, bfloat16, AdamW: against
transformers in eager mode (the same weights, batches, autocast, fused AdamW), in interleaved rounds
in one process; and our own packed documents, and Muon, as shares of our plain figure.

    python benchmarks/train_gpu.py [--rounds 3] [--rows 16] [--micro-rows 2]

Needs about 60 GB of GPU memory; without a GPU a tiny shape on CPU shows that it runs. Prints a
table and, last, one JSON line. `ratio` is the median over rounds of ours / theirs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from vicugna import models
from vicugna.distributed import Ranks
from vicugna.models.counts import count
from vicugna.training import cost
from vicugna.training.batch import TrainingBatch
from vicugna.training.objectives import next_token
from vicugna.training.recipe import OptimiserSpec, StageSpec
from vicugna.training.trainer import train

LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 4096, "rope_theta": 500000.0, "tie_word_embeddings": True}
TINY = {**LLAMA_1B, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
WARMUP = 2  # steps that compile, allocate and are not counted
RATE = 1e-4
Result = tuple[float, list[float], int]  # seconds of a step, losses, peak bytes of GPU memory


def transformers_eager(state: dict[str, Tensor], batches: list[Tensor], micro: int,
                       shape: dict[str, Any], device: torch.device) -> Result:
    """A plain loop over LlamaForCausalLM."""
    network: Any = LlamaForCausalLM(LlamaConfig(**shape))
    network.to(device).load_state_dict(state)
    optimiser = torch.optim.AdamW(network.parameters(), lr=RATE, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    losses, begins = [], []
    for batch in batches:
        begins.append(time.perf_counter())
        total = torch.zeros((), device=device)
        for part in batch.split(micro):
            tokens = part.to(device)
            with torch.autocast(device.type, torch.bfloat16):
                # Of T + 1 tokens the first T are read, as in our rows.
                loss = network(tokens[:, :-1], labels=tokens[:, 1:], shift_labels=tokens[:, 1:]
                               ).loss * (len(part) / len(batch))
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(total.item())
    return _seconds(begins), losses, _peak(device)


def ours(state: dict[str, Tensor], batches: list[Tensor], micro: int, shape: dict[str, Any],
         device: torch.device, documents: bool = False, muon: bool = False) -> Result:
    """This package's trainer."""
    with torch.device("meta"):
        network = models.build({"model_type": "llama", **shape})
    begins: list[float] = []

    def batch_of(step: int) -> TrainingBatch:
        begins.append(time.perf_counter())
        tokens, (B, T) = batches[step], (len(batches[step]), batches[step].shape[1] - 1)
        positions = torch.arange(T).expand(B, T)
        if documents:  # of 600 tokens, about
            random = torch.Generator().manual_seed(step)
            starts = torch.rand(B, T, generator=random) < 1 / 600
            positions = positions - (positions * starts).cummax(1).values
        return TrainingBatch(tokens[:, :-1], positions, tokens[:, 1:], torch.ones(B, T),
                             float(B * T))

    spec = StageSpec(kind="pretrain", steps=len(batches), micro_rows=micro,
                     checkpoint_every=10**9, optimiser=OptimiserSpec(
                         kind="muon" if muon else "adamw", learning_rate=RATE, schedule="wsd",
                         muon_learning_rate=RATE, warmup=0, decay=1e-9))
    with tempfile.TemporaryDirectory() as folder:
        train(network, next_token, batch_of, spec, Path(folder), "bench", Ranks(device=device),
              values=((name, state[name]) for name, _ in network.named_parameters()))
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return _seconds(begins), [json.loads(line)["loss"] for line in lines], _peak(device)


def _seconds(begins: list[float]) -> float:
    return statistics.median(b - a for a, b in pairwise(begins[WARMUP:]))


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--rounds", type=int, default=3 if cuda else 1)
    parser.add_argument("--steps", type=int, default=4, help="counted, of each way in a round")
    parser.add_argument("--rows", type=int, default=16 if cuda else 2)
    parser.add_argument("--micro-rows", type=int, default=2 if cuda else 1)
    parser.add_argument("--length", type=int, default=4096 if cuda else 64)
    options = parser.parse_args()
    logging.set_verbosity_error()
    device, shape = torch.device("cuda:0" if cuda else "cpu"), LLAMA_1B if cuda else TINY
    torch.manual_seed(0)
    state = {name: tensor.clone()
             for name, tensor in LlamaForCausalLM(LlamaConfig(**shape)).state_dict().items()}
    batches = [torch.randint(shape["vocab_size"], (options.rows, options.length + 1))
               for _ in range(WARMUP + options.steps + 1)]
    ways: dict[str, Callable[..., Result]] = {
        "transformers, eager": transformers_eager, "vicugna": ours,
        "vicugna, packed documents": partial(ours, documents=True),
        "vicugna, Muon": partial(ours, muon=True)}
    tokens = options.rows * options.length
    flops = 3 * count({"model_type": "llama", **shape}).flops(options.length)
    peaks = cost.peaks("bf16", device)
    peak = peaks.get("mfu", peaks["matmul_utilisation"])
    rates: dict[str, list[float]] = {way: [] for way in ways}
    losses, memory = dict[str, list[float]](), dict[str, int]()
    print(f"{'':27} {'tokens/s':>9} {'of peak':>8} {'GPU GB':>7} {'last loss':>10}")
    for _ in range(options.rounds):
        for way, run in ways.items():
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            seconds, losses[way], memory[way] = run(state, batches, options.micro_rows, shape,
                                                    device)
            rates[way].append(tokens / seconds)
            print(f"{way:27} {rates[way][-1]:9,.0f} {rates[way][-1] * flops / peak:8.1%} "
                  f"{memory[way] / 1e9:7.1f} {losses[way][-1]:10.4f}", flush=True)
    theirs, plain, packed, muon = (rates[way] for way in ways)

    def ratio(a: list[float], b: list[float]) -> float:
        return round(statistics.median(x / y for x, y in zip(a, b, strict=True)), 3)

    print(json.dumps({
        "benchmark": "train_gpu", "ratio": ratio(plain, theirs), "packed": ratio(packed, plain),
        "muon": ratio(muon, plain),
        "tokens_per_second": {way: round(statistics.median(rates[way])) for way in ways},
        "share_of": "published peak" if "mfu" in peaks else "measured matrix product",
        "share": round(statistics.median(plain) * flops / peak, 3),
        "loss_difference": max(abs(a - b) for a, b in zip(
            losses["vicugna"], losses["transformers, eager"], strict=True)),
        "peak_device_memory_bytes": memory, "rows": options.rows, "length": options.length,
        "micro_rows": options.micro_rows, "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu"}))


if __name__ == "__main__":
    main()
