"""The one training loop: texts, chats and policy gradients differ in batches and objective."""

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from vicugna import progress
from vicugna.distributed import Ranks
from vicugna.errors import VicugnaError
from vicugna.memory import peak_memory, trim_heap
from vicugna.models.counts import VISION, count
from vicugna.models.layers.moe import Balanced
from vicugna.training import cost, optimisers, parallel, state
from vicugna.training.batch import TrainingBatch
from vicugna.training.loss import Loss
from vicugna.training.metrics import Metrics
from vicugna.training.objectives import Objective
from vicugna.training.recipe import StageSpec

Batches = Callable[[int], TrainingBatch]
Validate = Callable[[nn.Module, int], dict[str, float]]
Values = Iterable[tuple[str, Tensor]]


def train(network: Any, objective: Objective, batch_of: Batches, spec: StageSpec,
          folder: Path, where: str, ranks: Ranks, validate: Validate | None = None,
          values: Values | None = None) -> dict[str, Any]:
    """Train `network` in place for `spec.steps` steps, resuming from `folder`/state if it is there.

    `batch_of(step)` must be a pure function of the step and the network's weights, so that a run
    killed anywhere ends in the same bytes. `validate(module, step)` gives further metrics after a
    step; `module` is the Loss as wrapped for the ranks. `values` are the parameters and buffers of
    a network on the meta device. Returns the cost. Raises VicugnaError when the loss stays
    non-finite.
    """
    network.train()
    for name, parameter in network.named_parameters():
        if name.startswith(VISION):  # texts never reach them
            parameter.requires_grad_(False)
    module = parallel.place(Loss(network, objective, spec.precision), spec, ranks, values)
    opts = optimisers.build(network, spec.optimiser)
    done = state.load(folder, module, opts, ranks)
    counts, peaks = count(network.config.to_dict()), cost.peaks(spec.precision, ranks.device)
    metrics = Metrics(folder, done["step"]) if ranks.first else None
    with progress.bar(where, spec.steps, ranks.first) as report:
        for step in range(done["step"], spec.steps):
            start = time.perf_counter()
            batch = batch_of(step)
            batch.check(network, where)
            lr = optimisers.schedule(opts, spec.optimiser, step, spec.steps)
            loss, norm = _step(module, network, opts, batch, spec, ranks)
            bad = 0 if isfinite(loss + norm) else done["bad"] + 1
            _check_finite(bad, step, spec, where)
            seconds = time.perf_counter() - start
            tokens = int(ranks.total(batch.tokens_BT.numel())[0])
            flops = tokens * (3 * counts.flops(batch.tokens_BT.shape[1]))
            spent = {"step": 1, "skipped": bad > 0, "tokens": tokens, "seconds": seconds,
                     "flops": flops}
            done = {"bad": bad, **{key: done[key] + value for key, value in spent.items()}}
            row = {"step": step, "loss": loss, "grad_norm": norm, "lr": lr,
                   "tokens": done["tokens"], "tokens_per_second": tokens / seconds,
                   **{share: flops / seconds / ranks.world / peak for share, peak in peaks.items()},
                   "skipped": done["skipped"], **batch.metrics}
            if validate:
                network.eval()
                row |= validate(module, step)
                network.train()
            if metrics:
                metrics.write(row)
            report(step + 1, _summary(row))
            if step % 50 == 49:
                trim_heap()
            if (step + 1) % spec.checkpoint_every == 0 and step + 1 < spec.steps:
                state.save(folder, module, opts, done, ranks)
    if metrics:
        metrics.close()
    network.eval()
    return {**{key: done[key] for key in ("tokens", "flops", "skipped")},
            "device_seconds": done["seconds"] * ranks.world, **peak_memory()}


def _summary(row: dict[str, Any]) -> str:
    """A step in a few words, for the progress bar."""
    share = f"{row['mfu']:.0%} MFU" if "mfu" in row else (
        f"{row['matmul_utilisation']:.0%} of matmul rate")
    return f"loss {row['loss']:.3f}, {row['tokens_per_second']:.0f} tok/s, {share}"


def _check_finite(bad: int, step: int, spec: StageSpec, where: str) -> None:
    """Raise VicugnaError after too many steps in a row whose loss or gradient was not finite."""
    patience = min(8, -(-spec.steps // 2))
    if bad >= patience:
        raise VicugnaError(f"the loss was not finite for {patience} steps in a row, the last being "
                           f"step {step}", where,
                           "Lower optimiser.learning_rate, or use precision: fp32")


def _step(module: nn.Module, network: nn.Module, opts: list[torch.optim.Optimizer],
          batch: TrainingBatch, spec: StageSpec, ranks: Ranks) -> tuple[float, float]:
    """One optimiser step. Returns the loss over all ranks and the gradient norm; a step whose
    loss or gradient is not finite leaves the weights as they were."""
    rows = batch.tokens_BT.shape[0]
    micro = spec.micro_rows or rows
    total = torch.zeros((), device=ranks.device)
    for start in range(0, rows, micro):
        more = start + micro < rows  # DDP sums over ranks once: they may differ in rows
        with module.no_sync() if more and isinstance(module, DDP) else nullcontext():
            loss = module(batch.part(slice(start, start + micro), ranks.device))
            # DDP and FSDP2 average gradients over ranks; the loss is a sum over them.
            (loss * (ranks.world / batch.norm)).backward()
        total += loss.detach() / batch.norm
    loss_value = ranks.total(total.item())[0]
    grad = torch.nn.utils.clip_grad_norm_(network.parameters(), spec.optimiser.clip)
    norm = float(grad.full_tensor() if hasattr(grad, "full_tensor") else grad)
    finite = isfinite(loss_value + norm)
    for opt in opts:
        if finite:
            opt.step()
        opt.zero_grad()
    balance_experts(network, ranks, 1e-3 if finite else 0.0)
    return loss_value, norm


def balance_experts(network: nn.Module, ranks: Ranks, rate: float) -> None:
    """Move the routers' biases by `rate` towards an even load over all ranks; reset the counts."""
    for module in network.modules():
        if isinstance(module, Balanced):
            load_E = torch.tensor(ranks.total(*module.tokens_per_expert.tolist()))
            module.balance(load_E, rate)
