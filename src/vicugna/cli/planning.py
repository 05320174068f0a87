"""Estimates of memory, FLOPs, GPUs, time and cost from a config.

Rooflines from published peaks (Williams et al., CACM 52(4), 2009), not measurements. The formulas
are in docs/guide.md.
"""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from vicugna import checkpoint
from vicugna.checkpoint.folder import read_object
from vicugna.checkpoint.source import PACKAGED
from vicugna.chips import GPUS, Gpu
from vicugna.errors import VicugnaError, did_you_mean
from vicugna.files import disk_errors
from vicugna.models import read_config
from vicugna.models.counts import count
from vicugna.training import recipe

# Bytes of a weight; int4 as in Q4_0: blocks of 32 weights of 4 bits and one 16-bit scale.
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "int4": 18 / 32}
STATE_BYTES = 16  # of a parameter in training: float32 weight 4, gradient 4, AdamW's moments 8
RESERVED = 0.1  # part of a GPU's memory for activations, buffers and fragments
NODE = 8  # GPUs
LENGTHS = {"1K": 2**10, "128K": 2**17, "1M": 2**20, "10M": 10 * 2**20}


@dataclass(frozen=True)
class Subject:
    """The model: the content of its config.json and where that was found."""

    name: str
    source: str
    config: dict[str, Any]
    note: str | None = None

    @property
    def context(self) -> int | None:
        """The context length; None if no network can be built from the config."""
        with suppress(ArithmeticError, AttributeError, TypeError, ValueError, VicugnaError):
            return read_config(self.config).context_length
        return None


def plan(of: Subject, gpu: str = "h100", dtype: str = "bf16", context: int = 8192,
         batch: int = 32, utilisation: float = 0.5, price: float = 2.0) -> dict[str, Any]:
    """The plan, for JSON: sizes in bytes, rates per second.

    It is for `batch` sequences of `context` tokens, on the smallest number of `gpu` that holds
    weights of `dtype` and the KV cache (bf16, or fp32 with fp32 weights), and for training with
    matrix products in bf16, on the smallest number that holds its state. `utilisation` is the
    fraction of each peak that is reached. VicugnaError for an unknown config, GPU or dtype.
    """
    if gpu.lower() not in GPUS:
        raise VicugnaError(f"unknown GPU {gpu!r}", "--gpu", did_you_mean(gpu, GPUS))
    if dtype not in WEIGHT_BYTES:
        raise VicugnaError(f"unknown dtype {dtype!r}", "--dtype", did_you_mean(dtype, WEIGHT_BYTES))
    if not (1e-6 <= utilisation <= 1 and 0 <= price <= 1e9):
        raise VicugnaError(f"a utilisation of {utilisation} or a price of {price} makes no sense",
                           "plan", "Give a part of 1, and what one GPU costs for an hour")
    try:
        counts = count(of.config)
    except VicugnaError as error:
        raise VicugnaError(error.what, of.source, error.fix) from error
    chip, forward, state = GPUS[gpu.lower()], counts.flops(context), counts.total * STATE_BYTES

    def cache_bytes(tokens: int, dtype: str = dtype) -> int:
        return counts.cache_elements(tokens) * (4 if dtype == "fp32" else 2)

    weights = {kind: counts.total * size for kind, size in WEIGHT_BYTES.items()}
    gpus = {kind: _gpus(chip, size + batch * cache_bytes(context, kind))
            for kind, size in weights.items()}
    training_gpus = _gpus(chip, state)

    def work(seconds: float, gpus: int, bound: str = "compute") -> dict[str, Any]:
        """From the seconds that one token takes on one GPU at its peaks."""
        hours = seconds / utilisation / 3600
        return {"tokens_per_second": gpus / (hours * 3600), "gpu_hours_per_million": 1e6 * hours,
                "cost_per_million": 1e6 * hours * price, "bound": bound}

    # A step of decoding gives each sequence a token, reads the weights once and all caches.
    moved = (counts.weights_read(batch) * WEIGHT_BYTES[dtype]
             + batch * cache_bytes(context)) / chip.bandwidth
    computed = batch * counts.decode_flops(context) / chip.peak(dtype)
    return {
        "parameters": {key: getattr(counts, key)
                       for key in ("total", "active", "multiplied", "routed")},
        "layers": len(counts.layers), "weight_bytes": weights,
        "cache_bytes": {name: cache_bytes(n) for name, n in LENGTHS.items()},
        "training_state_bytes": state,
        "flops_per_token": {"forward": forward, "training": 3 * forward,
                            "decode": counts.decode_flops(context)},
        "assumed": {"gpu": asdict(chip), "dtype": dtype, "context": context, "batch": batch,
                    "utilisation": utilisation, "price_per_gpu_hour": price, "reserved": RESERVED},
        "gpus": gpus, "training_gpus": training_gpus,
        "prefill": work(forward / chip.peak(dtype), gpus[dtype]),
        "decode": work(max(moved, computed) / batch, gpus[dtype],
                       "memory" if moved > computed else "compute"),
        "training": work(3 * forward / chip.peak("bf16"), training_gpus)}


def _gpus(gpu: Gpu, need: float) -> int:
    """1, 2, 4 or 8 GPUs, or whole nodes of 8, with `need` bytes split evenly."""
    n = max(1, math.ceil(need / (gpu.memory * (1 - RESERVED))))
    return 1 << (n - 1).bit_length() if n <= NODE else -(-n // NODE) * NODE


def subject(what: str) -> Subject:
    """The model that `what` names: one of published.yaml by name or Hub id, a config.json, a
    checkpoint in any format, or a recipe (.yaml). VicugnaError otherwise."""
    published = Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")
    known, wanted = yaml.safe_load(published)["models"], what.lower().replace("-instruct", "")
    for name, model in known.items():
        if wanted in (name, model["source"].lower().replace("-instruct", "")):
            return Subject(name, model["source"], model["config"], model.get("note"))
    path = Path(what).expanduser()
    if not path.exists() and what not in PACKAGED:
        raise VicugnaError("no such model, file or folder", what,
                           did_you_mean(wanted, [*known, *PACKAGED]))
    if path.suffix in (".yaml", ".yml"):
        read = recipe.read(path)
        return subject(read.model.start) if read.model.start else Subject(
            read.name, str(path), read.config)
    if path.suffix != ".json" and not (path / "config.json").exists():
        return Subject(path.stem, what, checkpoint.survey(what).config)
    path = path / "config.json" if path.is_dir() else path
    file = path.resolve()
    with disk_errors(path):
        config = read_object(file.parent, file.name)
    return Subject(path.parent.name if path.name == "config.json" else path.stem, str(path), config)
