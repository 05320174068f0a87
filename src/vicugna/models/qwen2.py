"""Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values.

Qwen Team, arXiv 2407.10671. Parameter names are those of Hugging Face's Qwen2ForCausalLM.
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
    """The keys of a Qwen2's config.json, with Hugging Face's defaults.

    Every layer has full attention; with `use_sliding_window`, those from `max_window_layers` on, or
    those that `layer_types` names, have a sliding window.
    """

    MAY_BE_ZERO = ("max_window_layers",)

    max_position_embeddings: int = 32768
    rope_scaling: dict[str, Any] | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.spans()

    def spans(self) -> list[Span]:
        """How each layer attends."""
        window = self.sliding_window if self.use_sliding_window else None
        kinds = self.layer_types or [
            "full_attention" if window is None or layer < self.max_window_layers
            else "sliding_attention" for layer in range(self.num_hidden_layers)]
        return spans(kinds, window, self.num_hidden_layers)

    def to_dict(self) -> dict[str, Any]:
        """config.json's content."""
        return {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
                "hidden_act": "silu", **asdict(self)}


class Network(decoder.Network):
    @staticmethod
    def layer(config: Config, n: int) -> Layer:
        return Layer(config, Attention(config, n, config.spans()[n], biases=(True, False)),
                     SwiGLU(config.hidden_size, config.intermediate_size))
