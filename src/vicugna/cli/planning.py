"""Estimates of memory, FLOPs, GPUs, time and cost from a config.

Rooflines from published peaks (Williams et al., CACM 52(4), 2009), not measurements. The formulas
are in docs/guide.md, under the names used here.
"""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property
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
from vicugna.models.counts import Counts, count

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


@dataclass(frozen=True)
class Work:
    """One workload on all GPUs: tokens per second, and the cost of a million tokens."""

    tokens_per_second: float
    gpu_hours_per_million: float
    cost_per_million: float
    bound: str


@dataclass(frozen=True)
class Plan:
    """`batch` sequences of `context` tokens, on the smallest number of `gpu` that holds weights of
    `dtype` and the KV cache; `utilisation` is the fraction of each peak that is reached."""

    counts: Counts
    gpu: Gpu
    dtype: str
    context: int
    batch: int
    utilisation: float
    price: float

    def weights(self, dtype: str) -> float:
        """Bytes of all weights."""
        return self.counts.total * WEIGHT_BYTES[dtype]

    def cache(self, tokens: int, dtype: str) -> int:
        """Bytes of one sequence's KV cache: bf16, or fp32 with fp32 weights."""
        return self.counts.cache_elements(tokens) * (4 if dtype == "fp32" else 2)

    def gpus(self, dtype: str) -> int:
        """The smallest number of GPUs that serves the batch with weights of `dtype`."""
        return self._fit(self.weights(dtype) + self.batch * self.cache(self.context, dtype))

    @property
    def state(self) -> int:
        """Bytes of weights, gradients and AdamW moments."""
        return self.counts.total * STATE_BYTES

    @property
    def training_gpus(self) -> int:
        """The smallest number of GPUs that holds the training state, sharded evenly."""
        return self._fit(self.state)

    def _fit(self, need: float) -> int:
        """1, 2, 4 or 8 GPUs, or whole nodes of 8, with `need` bytes split evenly."""
        n = max(1, math.ceil(need / (self.gpu.memory * (1 - RESERVED))))
        return 1 << (n - 1).bit_length() if n <= NODE else -(-n // NODE) * NODE

    @cached_property
    def prefill(self) -> Work:
        """Prefill of a prompt of `context` tokens: compute-bound."""
        seconds = self.counts.flops(self.context) / self.gpu.peak(self.dtype)
        return self._work(seconds, self.gpus(self.dtype), "compute")

    @cached_property
    def decode(self) -> Work:
        """Decode: a step yields a token per sequence and reads the weights once and all caches."""
        moved = (self.counts.weights_read(self.batch) * WEIGHT_BYTES[self.dtype]
                 + self.batch * self.cache(self.context, self.dtype)) / self.gpu.bandwidth
        flops = self.batch * self.counts.decode_flops(self.context) / self.gpu.peak(self.dtype)
        return self._work(max(moved, flops) / self.batch, self.gpus(self.dtype),
                          "memory" if moved > flops else "compute")

    @cached_property
    def training(self) -> Work:
        """Training on sequences of `context` tokens, matrix products in bf16."""
        seconds = 3 * self.counts.flops(self.context) / self.gpu.peak("bf16")
        return self._work(seconds, self.training_gpus, "compute")

    def _work(self, seconds: float, gpus: int, bound: str) -> Work:
        """From the seconds that one token takes on one GPU at its peaks."""
        hours = seconds / self.utilisation / 3600
        return Work(gpus / (hours * 3600), 1e6 * hours, 1e6 * hours * self.price, bound)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON: sizes in bytes, rates per second."""
        counts = self.counts
        return {
            "parameters": {key: getattr(counts, key)
                           for key in ("total", "active", "multiplied", "routed")},
            "layers": len(counts.layers),
            "weight_bytes": {dtype: self.weights(dtype) for dtype in WEIGHT_BYTES},
            "cache_bytes": {name: self.cache(n, self.dtype) for name, n in LENGTHS.items()},
            "training_state_bytes": self.state,
            "flops_per_token": {"forward": counts.flops(self.context),
                                "training": 3 * counts.flops(self.context),
                                "decode": counts.decode_flops(self.context)},
            "assumed": {"gpu": asdict(self.gpu), "dtype": self.dtype, "context": self.context,
                        "batch": self.batch, "utilisation": self.utilisation,
                        "price_per_gpu_hour": self.price, "reserved": RESERVED},
            "gpus": {dtype: self.gpus(dtype) for dtype in WEIGHT_BYTES},
            "training_gpus": self.training_gpus,
            "prefill": asdict(self.prefill), "decode": asdict(self.decode),
            "training": asdict(self.training)}


def plan(of: Subject, gpu: str = "h100", dtype: str = "bf16", context: int = 8192,
         batch: int = 32, utilisation: float = 0.5, price: float = 2.0) -> Plan:
    """The plan for a model. VicugnaError for an unknown config, GPU or dtype."""
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
    return Plan(counts, GPUS[gpu.lower()], dtype, context, batch, utilisation, price)


def subject(what: str) -> Subject:
    """The model that `what` names: one of published.yaml by name or Hub id, a config.json, a
    checkpoint in any format, or a recipe (.yaml). VicugnaError otherwise."""
    known, wanted = _published()["models"], what.lower().replace("-instruct", "")
    for name, model in known.items():
        if wanted in (name, model["source"].lower().replace("-instruct", "")):
            return Subject(name, model["source"], model["config"], model.get("note"))
    path = Path(what).expanduser()
    if not path.exists() and what not in PACKAGED:
        raise VicugnaError("no such model, file or folder", what,
                           did_you_mean(wanted, [*known, *PACKAGED]))
    if path.suffix in (".yaml", ".yml"):
        return _of_recipe(path)
    if path.suffix != ".json" and not (path / "config.json").exists():
        return Subject(path.stem, what, checkpoint.survey(what).config)
    path = path / "config.json" if path.is_dir() else path
    file = path.resolve()
    with disk_errors(path):
        config = read_object(file.parent, file.name)
    return Subject(path.parent.name if path.name == "config.json" else path.stem, str(path), config)


def _of_recipe(path: Path) -> Subject:
    from vicugna.training import recipe
    read = recipe.read(path)
    if read.model.start:
        return subject(read.model.start)
    return Subject(read.name, str(path), read.config)


@cache
def _published() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
