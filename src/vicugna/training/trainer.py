"""The one training loop: text, chats and policy gradients differ only in their batches."""

import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from vicugna import progress
from vicugna.distributed import Ranks
from vicugna.errors import VicugnaError
from vicugna.files import disk_errors, read_text, write_text
from vicugna.memory import peak_memory, return_memory
from vicugna.models.counts import IMAGES
from vicugna.models.layers.moe import Balanced
from vicugna.tokenizer import Tokenizer
from vicugna.training import cost, optimisers, parallel, state
from vicugna.training.loss import Objective
from vicugna.training.recipe import StageSpec


@dataclass
class WeightedBatch:
    """This rank's rows of one step, [B, T] each."""
    tokens_BT: Tensor  # int64, as are positions and targets
    positions_BT: Tensor
    targets_BT: Tensor
    weights_BT: Tensor  # float32
    norm: float  # what the weighted losses' sum over all ranks is divided by
    extra: dict[str, float]  # for the metrics

    def inputs(self, device: torch.device, rows: slice = slice(None)) -> list[Tensor]:
        """What an Objective takes, on `device`, of these rows."""
        return [x[rows].to(device) for x in (self.tokens_BT, self.positions_BT, self.targets_BT,
                                             self.weights_BT)]


def padding(tokenizer: Tokenizer, network: nn.Module) -> int:
    """The token that fills rows: the tokenizer's, or 0 if the network has no embedding of it, as
    when it was added to a tokenizer alone."""
    config: Any = network.config
    return tokenizer.pad_id if tokenizer.pad_id < config.vocab_size else 0


def train(network: nn.Module, batch_of: Callable[[int], WeightedBatch], spec: StageSpec,
          folder: Path, where: str, ranks: Ranks,
          validate: Callable[[nn.Module, int], dict[str, float]] | None = None) -> dict[str, Any]:
    """Train `network` in place for `spec.steps` steps, going on from `folder`/state if it is there.

    `batch_of(step)` must be a pure function of the step and the network's weights, so that a run
    killed anywhere ends in the same bytes. `validate(module, step)` gives what to note in
    metrics.jsonl after a step; `module` is the Objective as wrapped for the ranks. Returns the
    cost. Raises VicugnaError when the loss stays non-finite.
    """
    network.to(ranks.device).train()
    for name, parameter in network.named_parameters():
        if name.startswith(IMAGES):  # which texts never reach
            parameter.requires_grad_(False)
    objective = Objective(network, spec.precision)
    module = parallel.wrap(objective, spec, ranks)
    opts = optimisers.build(network, spec.optimiser)
    done = state.load(folder, module, opts, ranks)
    patience = min(8, -(-spec.steps // 2))  # bad steps in a row before training stops
    rate = cost.matmul_rate(objective.dtype, ranks.device) * ranks.world
    metrics = Metrics(folder, done["step"]) if ranks.first else None
    with progress.bar(where, spec.steps, ranks.first) as report:
        for step in range(done["step"], spec.steps):
            start = time.perf_counter()
            batch = batch_of(step)
            _check_tokens(batch, network, where)
            share = optimisers.factor(spec.optimiser, step, spec.steps)
            for opt in opts:
                for group in opt.param_groups:
                    group["lr"] = opt.defaults["lr"] * share
            loss, norm = _step(module, network, opts, batch, spec, ranks)
            bad = 0 if isfinite(loss + norm) else done["bad"] + 1
            if bad >= patience:
                raise VicugnaError(f"the loss was not finite for {patience} steps in a row, the "
                                   f"last being step {step}", where,
                                   "Lower optimiser.learning_rate, or use precision: fp32")
            seconds = time.perf_counter() - start
            tokens = int(ranks.total(batch.tokens_BT.numel())[0])
            flops = tokens * cost.flops_per_token(network, batch.tokens_BT.shape[1])
            new = {"step": 1, "skipped": bad > 0, "tokens": tokens, "seconds": seconds,
                   "flops": flops}
            done = {"bad": bad, **{key: done[key] + value for key, value in new.items()}}
            row = {"step": step, "loss": loss, "grad_norm": norm,
                   "lr": opts[0].param_groups[0]["lr"], "tokens": done["tokens"],
                   "tokens_per_second": tokens / seconds, "mfu": flops / seconds / rate,
                   "skipped": done["skipped"], **batch.extra}
            if validate:
                network.eval()
                row |= validate(module, step)
                network.train()
            if metrics:
                metrics.write(row)
            report(step + 1, f"loss {loss:.3f}, {tokens / seconds:.0f} tok/s, {row['mfu']:.0%} MFU")
            if step % 50 == 49:
                return_memory()
            if (step + 1) % spec.checkpoint_every == 0 and step + 1 < spec.steps:
                state.save(folder, module, opts, done, ranks)
    if metrics:
        metrics.close()
    network.eval()
    return {**{key: done[key] for key in ("tokens", "flops", "skipped")},
            "device_seconds": done["seconds"] * ranks.world,
            "peak_memory_bytes": peak_memory()}


def _check_tokens(batch: WeightedBatch, network: nn.Module, where: str) -> None:
    """Raise VicugnaError for a token without an embedding."""
    config: Any = network.config
    most = max(int(batch.tokens_BT.max()), int(batch.targets_BT.max()))
    if most >= config.vocab_size:
        raise VicugnaError(f"the data hold token {most}, but the model's vocab_size is "
                           f"{config.vocab_size}", where, "Use the tokenizer that the checkpoint "
                           "was made with, or leave out what was added to it")


def _step(module: nn.Module, network: nn.Module, opts: list[torch.optim.Optimizer],
          batch: WeightedBatch, spec: StageSpec, ranks: Ranks) -> tuple[float, float]:
    """One optimiser step. Returns the loss over all ranks and the gradient norm; a step whose
    loss or gradient is not finite leaves the weights as they were."""
    rows = batch.tokens_BT.shape[0]
    micro = spec.micro_rows or rows
    total = torch.zeros((), device=ranks.device)
    for start in range(0, rows, micro):
        more = start + micro < rows  # DDP sums over ranks once: they may differ in rows
        with module.no_sync() if more and isinstance(module, DDP) else nullcontext():
            loss = module(*batch.inputs(ranks.device, slice(start, start + micro)))
            # DDP and FSDP2 average gradients over ranks; the loss is a sum over them.
            (loss * (ranks.world / batch.norm)).backward()
        total += loss.detach() / batch.norm
    loss_value = ranks.total(total.item())[0]
    grad = torch.nn.utils.clip_grad_norm_(network.parameters(), spec.optimiser.clip)
    norm = float(grad.full_tensor() if hasattr(grad, "full_tensor") else grad)
    fine = isfinite(loss_value + norm)
    for opt in opts:
        if fine:
            opt.step()
        opt.zero_grad()
    balance_experts(network, ranks, 1e-3 if fine else 0.0)
    return loss_value, norm


def balance_experts(network: nn.Module, ranks: Ranks, rate: float) -> None:
    """Nudge routing biases towards an even load over all ranks; count anew."""
    for module in network.modules():
        if isinstance(module, Balanced):
            load_E = torch.tensor(ranks.total(*module.tokens_per_expert.tolist()))
            module.balance(load_E, rate)


class Metrics:
    """metrics.jsonl, and TensorBoard's files where that package is installed, for writing from
    `step` on: later lines, of a killed process, are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        lines = read_text(self.path).splitlines(keepends=True) if self.path.exists() else []
        write_text(self.path, "".join(line for line in lines if line.endswith("\n")  # not torn
                                      and json.loads(line)["step"] < step))
        with disk_errors(self.path):
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        except ImportError:
            self.board = None

    def write(self, row: dict[str, Any]) -> None:
        """Append one step's figures; null stands for what is not finite."""
        row = {key: value if isfinite(value) else None for key, value in row.items()}
        with disk_errors(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        for key, value in row.items() if self.board else ():
            if key != "step" and value is not None:
                self.board.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Flush to disk and close."""
        os.fsync(self.file.fileno())
        self.file.close()
        if self.board:
            self.board.close()
