"""Mistral 7B, Nemo, Small and Ministral: a Llama whose attention may have a sliding window.

Jiang et al., arXiv 2310.06825. Parameter names are those of Hugging Face's MistralForCausalLM and
MinistralForCausalLM, which is the same network.
"""

from dataclasses import asdict, dataclass
from typing import Any

from vicugna.models.layers import decoder
from vicugna.models.layers.config import Shape, spans
from vicugna.models.layers.mask import Span
from vicugna.models.layers.mlp import SwiGLU
from vicugna.models.llama import Attention, Layer


@dataclass(frozen=True)
class Config(Shape):
    """The keys of a Mistral's config.json, with Hugging Face's defaults. `sliding_window` None
    means full attention; `layer_types`, where given, says which layers have the window."""

    max_position_embeddings: int = 131072
    rope_scaling: dict[str, Any] | None = None
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None
    model_type: str = "mistral"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.spans()

    def spans(self) -> list[Span]:
        """How each layer attends."""
        default = "full_attention" if self.sliding_window is None else "sliding_attention"
        kinds = self.layer_types or [default] * self.num_hidden_layers
        return spans(kinds, self.sliding_window, self.num_hidden_layers)

    def to_dict(self) -> dict[str, Any]:
        """config.json's content."""
        values = asdict(self)
        if self.layer_types is None:  # a null key makes transformers take it for a Ministral
            del values["layer_types"]
        return {"architectures": [f"{self.model_type.title()}ForCausalLM"], "hidden_act": "silu",
                **values}


class Network(decoder.Network):
    @staticmethod
    def layer(config: Config, n: int) -> Layer:
        return Layer(config, Attention(config, n, config.spans()[n]),
                     SwiGLU(config.hidden_size, config.intermediate_size))
