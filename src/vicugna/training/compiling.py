"""torch.compile for training: one decoder layer at a time, in place."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vicugna.models.layers import flex
from vicugna.models.layers.moe import Experts


def compile_layers(network: Any, device: torch.device) -> None:
    """Compile the network's decoder layers where that is quicker: on a GPU with a working compiler
    (see layers/flex.py). Layers of experts are left out: their shapes change with the routing."""
    if flex.kernel(device) is not None:
        for layer in network.model.layers:
            if not any(isinstance(module, Experts) for module in layer.modules()):
                compile_in_place(layer)


def compile_in_place(layer: nn.Module) -> None:
    """Let a layer run compiled while it is in training mode: roll-outs and validation have other
    shapes. Only `forward` is replaced, so that names and hooks, FSDP2's too, stay as they are."""
    eager: Callable[..., Any] = layer.forward
    compiled = torch.compile(eager)

    def forward(*inputs: Any) -> Any:
        return compiled(*inputs) if layer.training else eager(*inputs)

    layer.forward = forward
