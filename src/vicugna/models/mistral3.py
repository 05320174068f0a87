"""Mistral Small 3.1 and 3.2, and Ministral 3 as published: the text model of a vision model.

Only text is computed; vision encoder and projector are passed through as they are stored. Parameter
names are those in the files of Hugging Face's Mistral3ForConditionalGeneration.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from vicugna.errors import config_error
from vicugna.models import ministral3, mistral
from vicugna.models.layers import decoder

TEXTS = {"mistral": mistral, "ministral3": ministral3}
IMAGE_KEYS = ("vision_config", "image_token_index", "multimodal_projector_bias",
              "projector_hidden_act", "spatial_merge_size", "vision_feature_layer")


@dataclass(frozen=True)
class Config(mistral.Config):
    """The keys of `text_config`, whose `model_type` says which text model it is, and under `images`
    those of config.json that are about images."""

    images: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        vision_parameters(self)  # raises for impossible sizes

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """As `Shape.from_dict`. The head is tied if config.json says so, or else `text_config`."""
        text = values.get("text_config")
        kind = str(text.get("model_type", "mistral")) if isinstance(text, Mapping) else ""
        if not isinstance(text, Mapping) or kind not in TEXTS:
            raise config_error(f"text_config is not of a {' or a '.join(TEXTS)}")
        tied = values.get("tie_word_embeddings")
        given = text if tied is None else {**text, "tie_word_embeddings": tied}
        read = TEXTS[kind].Config.from_dict({**given, "model_type": kind})
        return cls(**vars(read), images={key: values[key] for key in IMAGE_KEYS if key in values})

    def to_dict(self) -> dict[str, Any]:
        """config.json's content."""
        text = TEXTS[self.model_type].Config(
            **{key: value for key, value in vars(self).items() if key != "images"}).to_dict()
        return {"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"],
                "text_config": text, "tie_word_embeddings": self.tie_word_embeddings,
                **asdict(self)["images"]}


class Network(decoder.Multimodal):
    """As `decoder.Network`: text only."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, TEXTS[config.model_type].Network(config))


def vision_parameters(config: Config) -> int:
    """Parameters of the vision encoder (Pixtral, arXiv 2410.07073) and its projector, of which no
    network is made here; VicugnaError for impossible sizes. 0 without a `vision_config`."""
    if (vision := config.images.get("vision_config")) is None:
        return 0

    def size(of: Any, key: str, default: int) -> int:
        number = of.get(key, default) if isinstance(of, Mapping) else None
        if type(number) is not int or number < 1:
            raise config_error(f"{key} of the vision encoder is {number!r}")
        return number

    C, F = size(vision, "hidden_size", 1024), size(vision, "intermediate_size", 4096)
    layers, D = size(vision, "num_hidden_layers", 24), config.hidden_size
    patch = size(vision, "num_channels", 3) * size(vision, "patch_size", 16) ** 2
    encoder = patch * C + C + layers * (4 * C * C + 3 * C * F + 2 * C)
    layers_used = config.images.get("vision_feature_layer")
    width = C * (len(layers_used) if isinstance(layers_used, list) else 1)
    biases = 2 * D if config.images.get("multimodal_projector_bias") else 0
    merged = C * C * size(config.images, "spatial_merge_size", 2) ** 2
    return encoder + C + merged + width * D + D * D + biases
