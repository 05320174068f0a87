"""What training costs: memory, and the rate of FLOPs that this machine can reach."""

import timeit
from typing import Any

import torch
from torch import nn

from vicugna import chips, memory
from vicugna.errors import VicugnaError
from vicugna.models.counts import parameters


def matmul_rate(precision: str, device: torch.device) -> float:
    """Measured FLOPs per second of a large matrix product in `precision` on `device`."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    M, N = (1024, 2048) if device.type == "cpu" else (8192, 8192)
    a, b = (torch.randn(rows, N, device=device).to(dtype) for rows in (M, N))
    seconds = timeit.repeat(lambda: (a @ b)[-1, -1].item(), number=1, repeat=5)
    return 2.0 * M * N * N / min(seconds)


def peaks(precision: str, device: torch.device) -> dict[str, float]:
    """FLOPs per second that `device` could reach, by the metric that is a share of them:
    `matmul_utilisation` of a large matrix product measured here, and `mfu` (model FLOPs
    utilisation, arXiv 2204.02311) of what the maker publishes, if that is known."""
    found = {"matmul_utilisation": matmul_rate(precision, device)}
    gpu = chips.DEVICES.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return found | ({"mfu": gpu.peak(precision)} if gpu else {})


def training_memory(network: Any, rows: int, length: int, element: int, shards: int = 1) -> int:
    """Estimated bytes of one step: float32 weights, gradients and two moments, of which there is
    one of `shards` here; and activations: per token and layer about 16 widths and 4 feed-forward
    widths of `element` bytes each."""
    config = network.config
    per_token = config.num_hidden_layers * (16 * config.hidden_size + 4 * config.intermediate_size)
    return parameters(network) * 16 // shards + rows * length * per_token * element


def check_memory(network: nn.Module, rows: int, length: int, element: int, where: str,
                 shards: int = 1) -> None:
    """Raise VicugnaError, saying what would fit, when a step would not fit in memory."""
    free = memory.available_memory()
    none, one, needed = (training_memory(network, n, length, element, shards)
                         for n in (0, 1, rows))
    if none > free:
        raise VicugnaError(
            f"a network of {none * shards / 16e6:,.0f} million parameters needs about "
            f"{none / 2**30:,.1f} GiB to train and {free / 2**30:.1f} GiB are free, enough for "
            f"{free * shards / 16e6:,.0f} million", where, "Lower model.depth or model.width")
    fits = (free - none) // (one - none)
    if fits < rows:
        raise VicugnaError(
            f"a step of {rows} rows of {length} tokens needs about {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free", where,
            f"Set {where}.micro_rows to {fits}, which fits" if fits > 0 else
            "Even one row does not fit: lower model.depth or sequence_length")
