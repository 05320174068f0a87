"""The keys that every architecture's config.json has, read and validated."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, get_args, get_origin

from vicugna.errors import config_error
from vicugna.models.layers import rope
from vicugna.models.layers.mask import Span


@dataclasses.dataclass(frozen=True)
class Shape:
    """The base of every architecture's `Config`; VicugnaError for impossible shapes."""

    MAY_BE_ZERO: ClassVar[tuple[str, ...]] = ()  # whole numbers that need not be positive

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

        `num_key_value_heads` and `head_dim` may be absent, as in older files; where there is a
        `rope_scaling`, RoPE's keys are read by `rope_keys`. Raises VicugnaError for missing keys,
        wrong types, and values that ask for mathematics which are not implemented.
        """
        fields = dataclasses.fields(cls)
        if any(field.name == "rope_scaling" for field in fields):
            config = {**config, **rope_keys(config)}
        nullable = {field.name for field in fields if NoneType in get_args(field.type)}
        values = {key: value for key, value in config.items()
                  if value is not None or key in nullable}
        if values.get("hidden_act", "silu") not in ("silu", "swish"):
            raise config_error(f"hidden_act {values['hidden_act']!r} is not supported",
                               "Only silu is")
        width, heads = values.get("hidden_size"), values.get("num_attention_heads")
        required = {field.name for field in fields if field.default is dataclasses.MISSING}
        if missing := sorted(required - {"head_dim", "num_key_value_heads"} - values.keys()):
            raise config_error(f"missing {', '.join(missing)}")
        values.setdefault("num_key_value_heads", heads)
        if "head_dim" not in values and isinstance(width, int) and isinstance(heads, int):
            if heads > 0 and width % heads:
                raise config_error(
                    f"hidden_size {width} is not divisible by num_attention_heads {heads}",
                    "Choose a width that is a multiple of the heads")
            values["head_dim"] = width // max(heads, 1)
        return cls(**{field.name: typed(field.name, values[field.name], field.type)
                      for field in fields if field.name in values})

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type is int:
                self.at_least(field.name, 0 if field.name in self.MAY_BE_ZERO else 1)
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise config_error(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}",
                "Choose key/value heads that divide the query heads")
        if self.head_dim % 2:
            raise config_error(f"head_dim {self.head_dim} is odd",
                               "Rotary embedding needs an even head_dim")
        if self.rope_theta <= 0 or self.rms_norm_eps < 0:
            raise config_error(
                f"rope_theta is {self.rope_theta} and rms_norm_eps is {self.rms_norm_eps}",
                "rope_theta must be positive, rms_norm_eps not negative")
        scaling = getattr(self, "rope_scaling", None)
        rope.inverse_frequencies(2, self.rope_theta, scaling)  # raises for an impossible one

    @property
    def context_length(self) -> int:
        """Positions the model is made for, the limit of prompts and training sequences:
        `max_position_embeddings`, or `factor` times the original context if that is more. Model
        cards that add YaRN for long texts leave `max_position_embeddings` as it was."""
        return max(self.max_position_embeddings,
                   rope.scaled_context(getattr(self, "rope_scaling", None)))

    def at_least(self, name: str, least: int) -> None:
        """Raise VicugnaError if the field `name` is below `least`; None is not."""
        if (value := getattr(self, name)) is not None and value < least:
            raise config_error(f"{name} is {value}", f"It must be at least {least}")

    def check_experts(self, experts: str) -> None:
        """Raise VicugnaError if num_experts_per_tok is not from 1 to the field `experts`."""
        chosen, most = (getattr(self, name) for name in ("num_experts_per_tok", experts))
        if not 1 <= chosen <= most:
            raise config_error(f"num_experts_per_tok is {chosen}",
                               f"It must be from 1 to {experts} ({most})")


def rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` (None, or what `rope.inverse_frequencies` takes) of a
    config.json: transformers 5 nests both in `rope_parameters`, earlier releases keep two keys.
    An `original_max_position_embeddings` beside them comes before one inside, as there.

    Raises VicugnaError for RoPE that differs between layers, or covers only a part of a head.
    """
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping) or any(isinstance(x, Mapping) for x in scaling.values()):
        raise config_error("rope_scaling is not one set of keys for all layers")
    scaling = dict(scaling)
    theta = scaling.pop("rope_theta", config.get("rope_theta"))
    share = scaling.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise config_error(f"partial_rotary_factor {share!r} is not supported", "Only 1 is")
    kind, longest = rope.kind_of(scaling), config.get("max_position_embeddings")
    if kind in ("llama3", "yarn"):
        known = (config.get(rope.ORIGINAL), scaling.get(rope.ORIGINAL), longest)
        if (original := next((n for n in known if n is not None), None)) is not None:
            scaling[rope.ORIGINAL] = original
        if kind == "yarn" and longest is not None and scaling.get("factor", 1) is None:
            scaling["factor"] = longest / original
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else scaling}


def typed(name: str, value: Any, hint: Any) -> Any:
    """`value` if it has the type the field declares (an int is a float too), else VicugnaError."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kinds = tuple(get_origin(kind) or kind for kind in kinds)
    if float in kinds and int not in kinds and type(value) is int:
        return float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
        raise config_error(f"{name} is {value!r}, not of type {names}")
    return value


def spans(kinds: Sequence[str], window: int | None, layers: int) -> list[Span]:
    """How each layer attends, by config.json's `layer_types` and `sliding_window`; VicugnaError for
    impossible ones."""
    known = {"full_attention": Span(), "sliding_attention": Span(window)}
    if len(kinds) != layers or not all(kind in known for kind in map(str, kinds)):
        raise config_error(f"layer_types is not {layers} names among {', '.join(known)}")
    if "sliding_attention" in kinds and (window is None or window < 1):
        raise config_error(f"sliding_window is {window}",
                           "Layers of sliding attention need at least 1")
    return [known[kind] for kind in kinds]
