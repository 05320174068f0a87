"""The one training loop: text, chats and policy gradients differ only in their batches."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vicugna import progress
from vicugna.errors import VicugnaError
from vicugna.files import storage_error, write_text
from vicugna.models.layers.moe import MoE
from vicugna.training import cost, optimisers, parallel, state
from vicugna.training.loss import Objective
from vicugna.training.parallel import Ranks
from vicugna.training.recipe import StageSpec

PATIENCE = 8  # steps in a row with a loss that is not finite before training stops


@dataclass
class WeightedBatch:
    """This rank's rows of one step, [B, T] each: int64 ids, positions, targets, float32 weights.

    `norm` is what the sum of the weighted losses over all ranks is divided by. `extra` is noted
    in the metrics.
    """

    tokens_BT: Tensor
    positions_BT: Tensor
    targets_BT: Tensor
    weights_BT: Tensor
    norm: float
    extra: dict[str, float]


def train(network: nn.Module, batch_of: Callable[[int], WeightedBatch], spec: StageSpec,
          folder: Path, where: str, ranks: Ranks,
          validate: Callable[[nn.Module, int], dict[str, float]] | None = None) -> dict[str, Any]:
    """Train `network` in place for `spec.steps` steps, going on from `folder`/state if it is there.

    `batch_of(step)` must be a pure function of the step and the network's weights, so that a run
    killed anywhere ends in the same bytes. `validate(module, step)` gives what to note after a
    step, {} when it is not due; `module` is the Objective as wrapped for the ranks. Metrics go to
    `folder`/metrics.jsonl, a line a step. Returns the cost: tokens, flops, device-seconds, skipped
    steps and peak memory.
    Raises VicugnaError when the loss stays non-finite.
    """
    network.to(ranks.device).train()
    muon = spec.optimiser.kind == "muon"
    objective = Objective(network, spec.precision)
    module = parallel.wrap(objective, network, spec.parallel, spec.precision, muon, ranks)
    opts = optimisers.build(network, spec.optimiser)
    done = state.load(folder, module, opts, ranks) or dict(state.BEGINNING)
    patience = min(PATIENCE, -(-spec.steps // 2))
    rate = cost.matmul_rate(objective.dtype, ranks.device) * ranks.world
    metrics = Metrics(folder, done["step"]) if ranks.first else None
    with progress.bar(where, spec.steps, ranks.first) as report:
        for step in range(done["step"], spec.steps):
            start = time.perf_counter()
            batch = batch_of(step)
            optimisers.set_factor(opts, optimisers.factor(spec.optimiser, step, spec.steps))
            loss, norm = _step(module, network, opts, batch, spec, ranks)
            bad = 0 if _finite(loss, norm) else done["bad"] + 1
            if bad >= patience:
                raise VicugnaError(f"the loss was not finite for {patience} steps in a row, the "
                                   f"last being step {step}", where,
                                   "Lower optimiser.learning_rate, or use precision: fp32")
            seconds = time.perf_counter() - start
            tokens = int(ranks.total(batch.tokens_BT.numel())[0])
            flops = tokens * cost.flops_per_token(network, batch.tokens_BT.shape[1])
            done = {"step": step + 1, "skipped": done["skipped"] + (bad > 0), "bad": bad,
                    "tokens": done["tokens"] + tokens, "seconds": done["seconds"] + seconds,
                    "flops": done["flops"] + flops}
            row = {"step": step, "loss": loss, "grad_norm": norm,
                   "lr": opts[0].param_groups[0]["lr"], "tokens": done["tokens"],
                   "tokens_per_second": tokens / seconds,
                   "mfu": flops / seconds / rate, "skipped": done["skipped"], **batch.extra}
            if validate is not None:
                network.eval()
                row |= validate(module, step)
                network.train()
            if metrics is not None:
                metrics.write(row)
            report(step + 1, f"loss {loss:.3f}  {tokens / seconds:,.0f} tok/s  "
                             f"{row['mfu']:.0%} of matmul rate")
            if (step + 1) % spec.checkpoint_every == 0 and step + 1 < spec.steps:
                state.save(folder, module, opts, done, ranks)
    if metrics is not None:
        metrics.close()
    network.eval()
    return {"tokens": done["tokens"], "flops": done["flops"],
            "device_seconds": done["seconds"] * ranks.world, "skipped": done["skipped"],
            "peak_memory_bytes": cost.peak_memory()}


def _step(module: nn.Module, network: nn.Module, opts: list[torch.optim.Optimizer],
          batch: WeightedBatch, spec: StageSpec, ranks: Ranks) -> tuple[float, float]:
    """One optimiser step. Returns the loss over all ranks and the gradient norm; a step whose
    loss or gradient is not finite leaves the weights as they were."""
    rows = batch.tokens_BT.shape[0]
    micro = spec.micro_rows or rows
    total = torch.zeros((), device=ranks.device)
    for start in range(0, rows, micro):
        part = slice(start, start + micro)
        with parallel.accumulating(module, last=start + micro >= rows):
            loss = module(*(x[part].to(ranks.device) for x in (
                batch.tokens_BT, batch.positions_BT, batch.targets_BT, batch.weights_BT)))
            # DDP and FSDP2 average gradients over ranks; the loss is a sum over them.
            (loss * (ranks.world / batch.norm)).backward()
        total += loss.detach() / batch.norm
    loss_value = ranks.total(total.item())[0]
    grad = torch.nn.utils.clip_grad_norm_(network.parameters(), spec.optimiser.clip)
    norm = float(grad.full_tensor() if hasattr(grad, "full_tensor") else grad)
    fine = _finite(loss_value, norm)
    for opt in opts:
        if fine:
            opt.step()
        opt.zero_grad()
    balance_experts(network, ranks, 1e-3 if fine else 0.0)
    return loss_value, norm


def _finite(*values: float) -> bool:
    return all(abs(value) < float("inf") for value in values)


def balance_experts(network: nn.Module, ranks: Ranks, rate: float) -> None:
    """Nudge each expert's routing bias towards an even load (DeepSeek V3, arXiv 2412.19437), and
    begin to count anew."""
    for module in network.modules():
        if isinstance(module, MoE):
            load_E = torch.tensor(ranks.total(*module.tokens_per_expert.tolist()))
            module.expert_bias += rate * torch.sign(load_E.mean() - load_E).to(module.expert_bias)
            module.tokens_per_expert.zero_()


class Metrics:
    """metrics.jsonl, and TensorBoard's files where that package is installed."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open for writing from `step` on: later lines, of a killed process, are dropped."""
        self.path = folder / "metrics.jsonl"
        write_text(self.path, "".join(line for line in self._lines()
                                      if json.loads(line)["step"] < step))
        try:
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise storage_error(error, self.path) from error
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        except ImportError:
            self.board = None

    def _lines(self) -> list[str]:
        """The whole lines of an earlier process; a torn last one is dropped."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]

    def write(self, row: dict[str, Any]) -> None:
        """Append one step's figures; null stands for what is not finite."""
        row = {key: value if _finite(value) else None for key, value in row.items()}
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            raise storage_error(error, self.path) from error
        if self.board is not None:
            for key, value in row.items():
                if key != "step" and value is not None:
                    self.board.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Flush to disk and close."""
        os.fsync(self.file.fileno())
        self.file.close()
        if self.board is not None:
            self.board.close()
