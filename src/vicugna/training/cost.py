"""What training costs: FLOPs, memory, and the rate this machine can reach."""

from __future__ import annotations

import os
import resource
import sys
import time
from typing import Any

import torch
from torch import nn

from vicugna.errors import VicugnaError


def flops_per_token(network: nn.Module, length: int) -> float:
    """Floating-point operations of one trained token, forward and backward.

    6 per parameter in a matrix product (embedding look-ups cost none; of a mixture only the
    chosen experts count) and 12 per feature of queries and visible keys (Kaplan et al.,
    arXiv 2001.08361; Chowdhery et al., arXiv 2204.02311), half of `length` being visible.
    """
    config: Any = network.config
    matrices = sum(p.numel() for name, p in network.named_parameters()
                   if p.ndim >= 2 and "embed_tokens" not in name and "lm_head" not in name)
    experts = getattr(config, "num_experts", 0)
    if experts:
        inside = sum(p.numel() for name, p in network.named_parameters()
                     if name.endswith(("gate_up_proj", "mlp.down_proj")))
        matrices -= inside * (1 - config.num_experts_per_tok / experts)
    matrices += config.vocab_size * config.hidden_size
    window = float(getattr(config, "sliding_window", length))
    everything = getattr(config, "is_global", lambda layer: True)
    visible = sum(length / 2 if everything(layer) else min(length / 2, window)
                  for layer in range(config.num_hidden_layers))
    return 6.0 * matrices + 12.0 * visible * config.num_attention_heads * config.head_dim


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per second of a large matrix product here, the limit that utilisation is a share of."""
    a = torch.randn(1024, 2048, device=device).to(dtype)
    b = torch.randn(2048, 2048, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2.0 * 1024 * 2048 * 2048 / best


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int:
    """Bytes this process can still use, by the kernel's estimate and the container's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file
                        if line.startswith("MemAvailable"))
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            used = int(file.read())
        if limit != "max":
            free = min(free, int(limit) - used)
    except (OSError, StopIteration, ValueError):
        pass
    return free


def training_memory(network: nn.Module, rows: int, length: int, element: int) -> int:
    """Estimated bytes of one step: float32 weights, gradients and two moments, plus activations.

    Per token and layer about 16 widths and 4 feed-forward widths are kept for the backward pass,
    `element` bytes each, and per global layer the scores are recomputed, not kept.
    """
    config: Any = network.config
    parameters = sum(p.numel() for p in network.parameters())
    kept = config.num_hidden_layers * (16 * config.hidden_size + 4 * config.intermediate_size)
    return parameters * 16 + rows * length * kept * element


def check_size(config: dict[str, Any]) -> None:
    """Raise VicugnaError when a new network of `config` could not be trained in this memory."""
    D, heads = config["hidden_size"], config["num_attention_heads"]
    attention = 2 * D * D * (1 + config["num_key_value_heads"] / heads)
    feed_forward = 3 * D * config["intermediate_size"] * max(1, config.get("num_experts", 0))
    parameters = config["num_hidden_layers"] * (attention + feed_forward) + (
        config["vocab_size"] * D * (1 if config["tie_word_embeddings"] else 2))
    free = available_memory()
    if parameters * 16 > free:
        raise VicugnaError(
            f"a network of {parameters / 1e6:,.0f} million parameters needs about "
            f"{parameters * 16 / 2**30:,.1f} GiB to train and {free / 2**30:.1f} GiB are free, "
            f"enough for {free / 16e6:,.0f} million", "model", "Lower model.depth or model.width")


def check_memory(network: nn.Module, rows: int, length: int, element: int, where: str) -> None:
    """Raise VicugnaError, saying what would fit, when a step would not fit in memory."""
    free = available_memory()
    needed = training_memory(network, rows, length, element)
    if needed <= free:
        return
    fits = rows
    while fits > 1 and training_memory(network, fits, length, element) > free:
        fits //= 2
    if training_memory(network, fits, length, element) > free:
        fix = "Even one row does not fit: lower model.depth or sequence_length"
    else:
        fix = f"Set {where}.micro_rows to {fits}, which fits"
    raise VicugnaError(
        f"a step of {rows} rows of {length} tokens needs about {needed / 2**30:.1f} GiB and "
        f"{free / 2**30:.1f} GiB are free", where, fix)
