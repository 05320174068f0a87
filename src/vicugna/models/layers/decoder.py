"""What every architecture shares: embeddings, a stack of layers, a final norm and the head."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vicugna.models.layers import rope
from vicugna.models.layers.attention import Attend
from vicugna.models.layers.mask import Span
from vicugna.models.layers.norm import RMSNorm


class Decoder(nn.Module):
    """Embeddings and layers, each called as `layer(x_BTD, positions_BT, rotation, attend)`."""

    def __init__(self, config: Any, layer: Callable[[Any, int], nn.Module]) -> None:
        super().__init__()
        self.config = config
        # Not initialised here: `models.initialise` or a checkpoint does that.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers: Any = nn.ModuleList(
            layer(config, n) for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._inverse: Tensor | None = None

    @property
    def spans(self) -> set[Span]:
        """The attention patterns of its layers."""
        return {layer.self_attn.span for layer in self.layers}

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        return self.from_embeddings(self.embed_tokens(tokens_BT), positions_BT, attend)

    def from_embeddings(self, x_BTD: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        """As `forward`, from embeddings [B, T, D], some of which may be features of images."""
        rotation = self.rotation(positions_BT, x_BTD.dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, positions_BT, rotation, attend)
        return self.norm(x_BTD)

    def rotation(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of RoPE at positions [B, T], each [B, T, 1, K/2]. Its frequencies are
        computed once a device; no buffer, so no checkpoint has them."""
        c, device = self.config, positions_BT.device
        scaling = getattr(c, "rope_scaling", None)
        if self._inverse is None or self._inverse.device != device:
            with torch.inference_mode(False):  # training may use it after generation
                inverse = rope.inverse_frequencies(c.head_dim, c.rope_theta, scaling)
                self._inverse = inverse.to(device)
        return rope.rotation(positions_BT, self._inverse, dtype, rope.attention_factor(scaling))


class Network(nn.Module):
    """`hidden_BTD = network(tokens_BT, positions_BT, attend)`; `network.lm_head(hidden_BTD)`."""

    layer: Callable[[Any, int], nn.Module]  # makes layer n of the architecture

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, self.layer)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        """Token ids and positions [B, T] (int64) -> final normalised hidden states [B, T, D]."""
        return self.model(tokens_BT, positions_BT, attend)


class Multimodal(nn.Module):
    """A network around a text model, `language_model`, whose decoder and head it exposes."""

    def __init__(self, config: Any, language_model: Network) -> None:
        super().__init__()
        self.config = config
        self.language_model = language_model

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        """As `Network`, text only."""
        return self.language_model(tokens_BT, positions_BT, attend)

    @property
    def model(self) -> Decoder:
        """The decoder, as text-only networks have it."""
        return self.language_model.model

    @property
    def lm_head(self) -> nn.Linear:
        """The head, as text-only networks have it."""
        return self.language_model.lm_head
