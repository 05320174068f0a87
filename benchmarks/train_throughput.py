"""Training throughput of a llama model against transformers' Trainer: the same network, weights,
precision, batches and optimiser, in interleaved rounds in one process.

    python benchmarks/train_throughput.py [--rounds 5] [--steps 4]

Prints a table and, last, one JSON line. `ratio` is the median over rounds of ours / theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from vicugna import models
from vicugna.distributed import Ranks
from vicugna.models.counts import count
from vicugna.training.batch import TrainingBatch
from vicugna.training.cost import matmul_rate
from vicugna.training.objectives import next_token
from vicugna.training.recipe import OptimiserSpec, StageSpec
from vicugna.training.trainer import train

SHAPE: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408,
         "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
         "max_position_embeddings": 1024, "tie_word_embeddings": True}
LEARNING_RATE = 1e-4


class StepTimes(TrainerCallback):
    """When each optimiser step of transformers' Trainer ended, seconds."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def theirs(state: dict[str, torch.Tensor], batches: list[torch.Tensor], precision: str
           ) -> tuple[float, float]:
    """(median seconds of a step after the first, last loss) of transformers' Trainer."""
    network = LlamaForCausalLM(LlamaConfig(**SHAPE))
    network.load_state_dict(state)
    rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch]
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=batches[0].shape[0],
            max_steps=len(batches), bf16=precision == "bf16", use_cpu=not torch.cuda.is_available(),
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.0,
            adam_beta2=0.95, max_grad_norm=1.0, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, seed=0,
            train_sampling_strategy="sequential")
        trainer = Trainer(network, arguments, train_dataset=rows, callbacks=[times])
        trainer.train()
    with torch.no_grad():
        loss = network(batches[-1][:1].to(network.device),
                       labels=batches[-1][:1].to(network.device)).loss.item()
    return statistics.median(b - a for a, b in pairwise(times.ends)), loss


def ours(state: dict[str, torch.Tensor], batches: list[torch.Tensor], precision: str
         ) -> tuple[float, float]:
    """The same of this package's trainer."""
    network = models.build({"model_type": "llama", **SHAPE})
    network.load_state_dict(state)
    begins: list[float] = []

    def batch_of(step: int) -> TrainingBatch:
        begins.append(time.perf_counter())
        tokens = batches[step]
        positions = torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1)
        weights = torch.ones(tokens.shape[0], tokens.shape[1] - 1)
        return TrainingBatch(tokens[:, :-1], positions, tokens[:, 1:], weights,
                             float(weights.sum()))

    spec = StageSpec(kind="pretrain", steps=len(batches), precision=precision,
                     checkpoint_every=10**9,
                     optimiser=OptimiserSpec(kind="adamw", learning_rate=LEARNING_RATE,
                                             schedule="wsd", warmup=0, decay=1e-9, beta1=0.9))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        train(network, next_token, batch_of, spec, Path(folder), "bench", Ranks(device=device))
    reference = LlamaForCausalLM(LlamaConfig(**SHAPE))
    reference.load_state_dict(network.state_dict())
    with torch.no_grad():
        loss = reference(batches[-1][:1], labels=batches[-1][:1]).loss.item()
    return statistics.median(b - a for a, b in pairwise(begins)), loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.manual_seed(0)
    first = LlamaForCausalLM(LlamaConfig(**SHAPE))
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    batches = [torch.randint(0, SHAPE["vocab_size"], (options.rows, options.length + 1))
               for _ in range(options.steps + 1)]
    tokens = options.rows * options.length
    rounds = []
    for _ in range(options.rounds):
        (a, loss_a), (b, loss_b) = (theirs(state, batches, options.precision),
                                    ours(state, batches, options.precision))
        rounds.append((tokens / a, tokens / b, loss_a, loss_b))
        print(f"transformers {tokens / a:9,.0f} tok/s   vicugna {tokens / b:9,.0f} tok/s   "
              f"ratio {a / b:.2f}   loss after {loss_a:.4f} / {loss_b:.4f}", flush=True)
    ratio = statistics.median(mine / other for other, mine, _, _ in rounds)
    network = models.build({"model_type": "llama", **SHAPE})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mine = statistics.median(r[1] for r in rounds)
    print(json.dumps({
        "benchmark": "train_throughput", "ratio": round(ratio, 3),
        "vicugna_tokens_per_second": round(mine),
        "transformers_tokens_per_second": round(statistics.median(r[0] for r in rounds)),
        "share_of_matmul_rate": round(
            mine * 3 * count({"model_type": "llama", **SHAPE}).flops(options.length)
            / matmul_rate(options.precision, device), 3),
        "parameters": sum(p.numel() for p in network.parameters()),
        "precision": options.precision, "rows": options.rows, "length": options.length,
        "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
