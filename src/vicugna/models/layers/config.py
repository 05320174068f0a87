"""The keys that every architecture's config.json has, how they are read, and what they must be."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from vicugna.errors import VicugnaError


@dataclasses.dataclass(frozen=True)
class Shape:
    """What an architecture's `Config` begins with; VicugnaError for impossible shapes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read config.json's mapping; keys that the dataclass does not have are ignored.

        `num_key_value_heads` and `head_dim` may be absent, as in older files. Raises VicugnaError
        for missing keys, wrong types, and switches that change the mathematics in ways not built.
        """
        values = {key: value for key, value in config.items() if value is not None}
        if values.get("hidden_act", "silu") not in ("silu", "swish"):
            raise VicugnaError(f"hidden_act {values['hidden_act']!r} is not supported",
                               "config.json", "Only silu is")
        width, heads = values.get("hidden_size"), values.get("num_attention_heads")
        fields = dataclasses.fields(cls)
        required = {field.name for field in fields if field.default is dataclasses.MISSING}
        if missing := sorted(required - {"head_dim", "num_key_value_heads"} - values.keys()):
            raise VicugnaError(f"missing {', '.join(missing)}", "config.json",
                               "Restore the keys from the original checkpoint")
        values.setdefault("num_key_value_heads", heads)
        if "head_dim" not in values and isinstance(width, int) and isinstance(heads, int):
            if heads > 0 and width % heads:
                raise VicugnaError(
                    f"hidden_size {width} is not divisible by num_attention_heads {heads}",
                    "config.json", "Choose a width that is a multiple of the heads")
            values["head_dim"] = width // max(heads, 1)
        return cls(**{field.name: _typed(field.name, values[field.name], field.type)
                      for field in fields if field.name in values})

    def __post_init__(self) -> None:
        for field in dataclasses.fields(Shape):
            if field.type is int:
                self.at_least(field.name, 1)
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise VicugnaError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}",
                "config.json", "Choose key/value heads that divide the query heads")
        if self.head_dim % 2:
            raise VicugnaError(f"head_dim {self.head_dim} is odd", "config.json",
                               "Rotary embedding needs an even head_dim")

    def at_least(self, name: str, least: int) -> None:
        """Raise VicugnaError if the field `name` is below `least`."""
        if getattr(self, name) < least:
            raise VicugnaError(f"{name} is {getattr(self, name)}", "config.json",
                               f"It must be at least {least}")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` if it has the type the field declares (an int is a float too), else VicugnaError."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (
            not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise VicugnaError(f"{name} is {value!r}, not of type {hint.__name__}", "config.json",
                           "Correct the value")
    return value
