"""The networks, one file per architecture, each named after its Hugging Face `model_type`."""

import math
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vicugna.errors import config_error, did_you_mean

# model_type -> the file that defines it.
ARCHITECTURES = {name: name for name in (
    "deepseek_v3", "llama", "llama4", "ministral3", "mistral", "mistral3", "mixtral", "qwen2",
    "vicugna")} | {"llama4_text": "llama4", "ministral": "mistral"}


def architecture(model_type: str | None) -> ModuleType:
    """The module that defines `model_type`; VicugnaError naming the nearest known one."""
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return import_module(f"vicugna.models.{ARCHITECTURES[model_type]}")
    what = "missing model_type" if model_type is None else f"unknown model_type {model_type!r}"
    raise config_error(what, did_you_mean(model_type, ARCHITECTURES))


def read_config(config: Mapping[str, Any]) -> Any:
    """The Config of the architecture that config.json's `model_type` names; VicugnaError."""
    return architecture(config.get("model_type")).Config.from_dict(config)


def build(config: Mapping[str, Any]) -> nn.Module:
    """A network of the architecture that config.json's `model_type` names, weights not set.

    Raises VicugnaError for an unknown architecture, missing keys or impossible shapes.
    """
    return architecture(config.get("model_type")).Network(read_config(config))


def initialise(network: nn.Module, seed: int) -> None:
    """Set every parameter to its `initial_values`."""
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for name, value in initial_values(network, seed):
            parameters[name].copy_(value)


def initial_values(network: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's first value by name, float32 on the CPU, one after the other: the same bytes
    for a `seed` on every machine, and for a network on the meta device or sharded.

    Matrices: normal with `initializer_range`; those that write into the residual stream divided
    by sqrt(2 * layers) (GPT-2's rule). Norms: one. Biases and convolutions: zero. SSMax's scale:
    0.5 (see docs/log.md).
    """
    config: Any = network.config
    generator = torch.Generator().manual_seed(seed)
    residual = 1 / math.sqrt(2 * config.num_hidden_layers)
    for name, parameter in network.named_parameters():
        owner, kind = name.split(".")[-2:]
        shape = tuple(parameter.shape)
        if kind == "log_scale":
            yield name, torch.full(shape, 0.5)
        elif kind == "bias" or owner == "conv":
            yield name, torch.zeros(shape)
        elif "norm" in owner:
            yield name, torch.ones(shape)
        else:
            scale = residual if "o_proj" in name or "down_proj" in name else 1.0
            drawn = torch.randn(shape, generator=generator)
            yield name, drawn.mul_(config.initializer_range * scale)
