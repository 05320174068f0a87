"""What a network holds, remembers and computes, read off the network itself.

It is built on PyTorch's meta device, where tensors have shapes and no memory (a second or less for
400 billion parameters), and asked for one token with an `attend` that takes notes. So no size is
written down twice, and an architecture that is added is counted too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vicugna import models
from vicugna.errors import VicugnaError
from vicugna.models.layers.mask import Span
from vicugna.models.layers.norm import RMSNorm

MOST = {"num_hidden_layers": 1000, "num_experts": 10**5, "num_local_experts": 10**5,
        "n_routed_experts": 10**5}  # more would only take time and memory
IMAGES = ("vision_model.", "multi_modal_projector.")  # not used by a token of text


@dataclass(frozen=True)
class LayerCost:
    """Attention of one layer: FLOPs of one query meeting one key (score and weighted value), the
    same where keys are remembered, and the numbers that are remembered of each key."""

    span: Span
    flops: int
    remembered_flops: int
    kept: int

    def held(self, tokens: int) -> int:
        """Keys a cache holds, at most, after `tokens`."""
        return min(tokens, self.span.window or self.span.chunk or tokens)

    def seen(self, tokens: int) -> float:
        """Keys that a token of a sequence of `tokens` sees, on average: its own included."""
        n = self.held(tokens)
        if self.span.chunk is None:  # the first n see 1, 2, ... n keys, the others n
            return n - n * (n - 1) / (2 * tokens)
        whole, rest = divmod(tokens, n)
        return (whole * n * (n + 1) + rest * (rest + 1)) / (2 * tokens)


@dataclass(frozen=True)
class Counts:
    """Parameters and costs of a network.

    total       every parameter, once (tied ones too), those of an image encoder included that is
                only kept
    active      those that a token of text passes, input embeddings and head included: all but the
                image encoder and the experts not chosen
    multiplied  active parameters in matrix products: no input embeddings, norms or biases
    routed      parameters of experts among which a router chooses, and
    share       which part of them each token passes (k / E)
    """

    total: int
    active: int
    multiplied: int
    routed: int
    share: float
    layers: tuple[LayerCost, ...]

    def flops(self, tokens: int) -> float:
        """Forward FLOPs of one token in a sequence of `tokens`, on average: 2 for each multiplied
        parameter and the attention to earlier tokens. Training takes three times as many
        (arXiv 2001.08361, 2204.02311)."""
        return 2.0 * self.multiplied + sum(x.flops * x.seen(tokens) for x in self.layers)

    def decode_flops(self, tokens: int) -> float:
        """FLOPs of the next token after `tokens` remembered ones, at most."""
        return 2.0 * self.multiplied + sum(x.remembered_flops * x.held(tokens)
                                           for x in self.layers)

    def cached(self, tokens: int) -> int:
        """Numbers in the cache of one sequence of `tokens`, at most."""
        return sum(x.kept * x.held(tokens) for x in self.layers)

    def read(self, batch: int) -> float:
        """Parameters read to decode one token of each of `batch` sequences; of routed experts,
        those expected to be chosen at least once when all are equally likely."""
        used = 1 - (1 - self.share) ** batch
        return self.multiplied + self.routed * (used - self.share)


def count(config: Mapping[str, Any]) -> Counts:
    """The counts of the network that a config.json describes; VicugnaError if none can be built."""
    return of(shaped(config))


def of(network: Any) -> Counts:
    """The counts of a network on the meta device, which is spoilt for other uses."""
    parameters = dict(network.named_parameters())
    stacks = [p for module in network.modules() for p in _stacks(module)]
    routed = _size(stacks)
    chosen = sum(p[0].numel() * network.config.num_experts_per_tok for p in stacks)
    text = {name: p for name, p in parameters.items() if not name.startswith(IMAGES)}
    multiplied = [p for name, p in text.items() if p.ndim > 1 and (
        not name.endswith("embed_tokens.weight") or p is network.lm_head.weight)]
    module = models.architecture(network.config.to_dict()["model_type"])
    kept = getattr(module, "kept", lambda config: 0)(network.config)
    return Counts(total=_size(parameters.values()) + kept,
                  active=_size(text.values()) - routed + chosen,
                  multiplied=_size(multiplied) - routed + chosen, routed=routed,
                  share=chosen / routed if routed else 0.0, layers=_layers(network))


def shaped(config: Mapping[str, Any]) -> nn.Module:
    """The network of a config.json, without memory for its weights; VicugnaError."""
    for part in (config, *(part for part in config.values() if isinstance(part, Mapping))):
        for key, most in MOST.items():
            if isinstance(number := part.get(key), int) and number > most:
                raise VicugnaError(f"{key} is {number:,}", "config.json",
                                   f"At most {most:,} are counted")
    try:
        with torch.device("meta"):
            return models.build(config)
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise VicugnaError(f"no network can be built from it: {reason}", "config.json",
                           "Correct its values") from error


def _stacks(module: nn.Module) -> list[nn.Parameter]:
    """The experts that `module` itself holds: of all parameters, they alone are stacked."""
    return [p for p in module.parameters(recurse=False) if p.ndim == 3]


def _size(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


class _Notes:
    """An `Attend` that computes nothing: shapes of queries, keys and values by layer."""

    def __init__(self, has_kv_cache: bool) -> None:
        self.has_kv_cache = has_kv_cache
        self.flops: list[int] = []
        self.kept: list[int] = []
        self.spans: list[Span] = []

    def conv_state(self, layer: int, x_BTD: Tensor, n: int) -> Tensor:
        return x_BTD.new_zeros(x_BTD.shape[0], n, x_BTD.shape[2])

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor | None,
                 span: Span) -> Tensor:
        H, K = q_BTHK.shape[2:]
        values_BTGK = k_BTGK if v_BTGK is None else v_BTGK
        self.spans.append(span)
        self.flops.append(2 * H * (K + values_BTGK.shape[3]))
        self.kept.append(k_BTGK[0, 0].numel() + (0 if v_BTGK is None else v_BTGK[0, 0].numel()))
        return q_BTHK.new_empty(*q_BTHK.shape[:3], values_BTGK.shape[3])


def _layers(network: Any) -> tuple[LayerCost, ...]:
    """Run one token through a network on the meta device."""
    # All but attention hands on the shape it is given, and may ask for more than shapes.
    others = [child for layer in network.model.layers for name, child in layer.named_children()
              if name != "self_attn"]
    norms = [module for module in network.modules() if isinstance(module, RMSNorm)]
    for module in others + norms:
        module.forward = lambda x, *_: x
    token = torch.zeros(1, 1, dtype=torch.long, device="meta")
    fresh, remembered = _Notes(has_kv_cache=False), _Notes(has_kv_cache=True)
    with torch.no_grad(), torch.device("meta"):  # RoPE's frequencies too are only shapes
        network(token, token, fresh)
        network(token, token, remembered)
    return tuple(map(LayerCost, fresh.spans, fresh.flops, remembered.flops, remembered.kept))
