"""Parameters, FLOPs and KV cache of a network, read off the network itself.

It is built on PyTorch's meta device, where tensors have shapes and no memory (a second or less for
400 billion parameters), and run on one token with an attention context that records shapes. So no
size is written down twice, and an architecture that is added is counted too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vicugna import models
from vicugna.errors import config_error
from vicugna.models.layers.mask import Span
from vicugna.models.layers.norm import RMSNorm

MOST = {"num_hidden_layers": 1000, "num_experts": 10**5, "num_local_experts": 10**5,
        "n_routed_experts": 10**5}  # more would only take time and memory
VISION = ("vision_model.", "multi_modal_projector.")  # parameters that no token of text passes


@dataclass(frozen=True)
class LayerCost:
    """Attention of one layer: FLOPs of one query against one key (score and weighted value), the
    same against a cached key, and the elements that are cached for each key."""

    span: Span
    flops: int
    cached_flops: int
    cache_elements: int

    def keys(self, tokens: int) -> int:
        """Keys in the cache, at most, after `tokens`: those that one query attends to, at most."""
        return min(tokens, self.span.window or self.span.chunk or tokens)

    def mean_keys(self, tokens: int) -> float:
        """Keys that a token of a sequence of `tokens` attends to, itself included, on average."""
        n = self.keys(tokens)
        if self.span.chunk is None:  # the first n attend to 1, 2, ... n keys, the others to n
            return n - n * (n - 1) / (2 * tokens)
        chunks, rest = divmod(tokens, n)
        return (chunks * n * (n + 1) + rest * (rest + 1)) / (2 * tokens)


@dataclass(frozen=True)
class Counts:
    """Parameters and costs of a network.

    total       every parameter, once (tied ones too), also those of a vision encoder that is only
                passed through
    active      those that a token of text passes, input embeddings and head included: all but the
                vision encoder and the experts not chosen
    multiplied  active parameters in matrix products: no input embeddings, norms or biases
    routed      parameters of experts among which a router chooses, and
    share       the part of them that each token passes (k / E)
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
        return 2.0 * self.multiplied + sum(x.flops * x.mean_keys(tokens) for x in self.layers)

    def decode_flops(self, tokens: int) -> float:
        """FLOPs of the next token after `tokens` cached ones, at most."""
        return 2.0 * self.multiplied + sum(x.cached_flops * x.keys(tokens) for x in self.layers)

    def cache_elements(self, tokens: int) -> int:
        """Elements of the KV cache of one sequence of `tokens`, at most."""
        return sum(x.cache_elements * x.keys(tokens) for x in self.layers)

    def weights_read(self, batch: int) -> float:
        """Parameters read to decode one token of each of `batch` sequences; of routed experts,
        those expected to be chosen at least once when all are equally likely."""
        used = 1 - (1 - self.share) ** batch
        return self.multiplied + self.routed * (used - self.share)


def parameters(network: nn.Module) -> int:
    """How many there are in memory, tied ones once."""
    return sum(parameter.numel() for parameter in network.parameters())


def count(config: Mapping[str, Any]) -> Counts:
    """The counts of the network that a config.json describes; VicugnaError if none can be built."""
    return of(shaped(config))


def of(network: Any) -> Counts:
    """The counts of a network on the meta device, which is of no other use afterwards."""
    named = dict(network.named_parameters())
    stacks = [p for p in named.values() if p.ndim == 3]  # experts are the only stacked parameters
    routed = _size(stacks)
    chosen = sum(p[0].numel() * network.config.num_experts_per_tok for p in stacks)
    text = {name: p for name, p in named.items() if not name.startswith(VISION)}
    multiplied = [p for name, p in text.items() if p.ndim > 1 and (
        not name.endswith("embed_tokens.weight") or p is network.lm_head.weight)]
    module = models.architecture(network.config.to_dict()["model_type"])
    not_built = getattr(module, "vision_parameters", lambda config: 0)(network.config)
    return Counts(total=_size(named.values()) + not_built,
                  active=_size(text.values()) - routed + chosen,
                  multiplied=_size(multiplied) - routed + chosen, routed=routed,
                  share=chosen / routed if routed else 0.0, layers=_layers(network))


def shaped(config: Mapping[str, Any]) -> nn.Module:
    """The network of a config.json, without memory for its weights; VicugnaError."""
    for part in (config, *(part for part in config.values() if isinstance(part, Mapping))):
        for key, most in MOST.items():
            if isinstance(number := part.get(key), int) and number > most:
                raise config_error(f"{key} is {number:,}", f"At most {most:,} are counted")
    try:
        with torch.device("meta"):
            return models.build(config)
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise config_error(f"no network can be built from it: {reason}") from error


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


class _ShapeRecorder:
    """An `Attend` that computes nothing: it records shapes of queries, keys and values by layer."""

    def __init__(self, has_kv_cache: bool) -> None:
        self.has_kv_cache = has_kv_cache
        self.layers: list[tuple[Span, int, int]] = []  # span, FLOPs and elements of each key

    def conv_state(self, layer: int, x_BTD: Tensor, n: int) -> Tensor:
        return x_BTD.new_zeros(x_BTD.shape[0], n, x_BTD.shape[2])

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor | None,
                 span: Span, scale: float | None = None) -> Tensor:
        H, K = q_BTHK.shape[2:]
        cached = [k_BTGK] if v_BTGK is None else [k_BTGK, v_BTGK]
        U = cached[-1].shape[3]
        self.layers.append((span, 2 * H * (K + U), _size(x[0, 0] for x in cached)))
        return q_BTHK.new_empty(*q_BTHK.shape[:3], U)


def _layers(network: Any) -> tuple[LayerCost, ...]:
    """Run one token through a network on the meta device."""
    # All modules but attention return the shape they are given, and may ask for more than shapes.
    others = [child for layer in network.model.layers for name, child in layer.named_children()
              if name != "self_attn"]
    norms = [module for module in network.modules() if isinstance(module, RMSNorm)]
    for module in others + norms:
        module.forward = lambda x, *_: x
    token = torch.zeros(1, 1, dtype=torch.long, device="meta")
    dense, cached = _ShapeRecorder(has_kv_cache=False), _ShapeRecorder(has_kv_cache=True)
    with torch.no_grad(), torch.device("meta"):  # RoPE's frequencies too are only shapes
        network(token, token, dense)
        network(token, token, cached)
    return tuple(LayerCost(span, flops, *costs)
                 for (span, flops, _), (_, *costs) in zip(dense.layers, cached.layers, strict=True))
