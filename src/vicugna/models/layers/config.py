"""Reading an architecture's `Config` from config.json, and the checks every architecture shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from vicugna.errors import VicugnaError

C = TypeVar("C")


def from_mapping(kind: type[C], values: Mapping[str, Any]) -> C:
    """Build the dataclass `kind` from config.json's keys; keys it does not have are ignored.

    `num_key_value_heads` and `head_dim` may be absent, as in older files. Raises VicugnaError
    for missing keys, wrong types, and switches that change the mathematics in ways not built.
    """
    values = {key: value for key, value in values.items() if value is not None}
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise VicugnaError(f"hidden_act {values['hidden_act']!r} is not supported", "config.json",
                           "Only silu is")
    heads = values.get("num_attention_heads")
    if heads is not None:
        values.setdefault("num_key_value_heads", heads)
    if (isinstance(heads, int) and heads > 0 and isinstance(values.get("hidden_size"), int)
            and "head_dim" not in values):
        if values["hidden_size"] % heads:
            raise VicugnaError(
                f"hidden_size {values['hidden_size']} is not divisible by num_attention_heads "
                f"{heads}", "config.json", "Choose a width that is a multiple of the heads")
        values["head_dim"] = values["hidden_size"] // heads
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if set(missing) & {"hidden_size", "num_attention_heads"}:  # the others follow from these
        missing = [name for name in missing if name not in ("head_dim", "num_key_value_heads")]
    if missing:
        raise VicugnaError(f"missing {', '.join(missing)}", "config.json",
                           "Restore the keys from the original checkpoint")
    hints = get_type_hints(kind)
    chosen = {name: _typed(name, values[name], hints[name]) for name in fields if name in values}
    return kind(**chosen)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` if it has the type the field declares (an int is a float too), else VicugnaError."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = hint if isinstance(hint, type) else None
    if plain in (int, float, bool, str) and (
            not isinstance(value, plain) or (plain is int and isinstance(value, bool))):
        raise VicugnaError(f"{name} is {value!r}, not of type {plain.__name__}", "config.json",
                           "Correct the value")
    return value


def rope_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from either form: transformers 5 nests both in
    `rope_parameters`, earlier releases keep two keys."""
    nested = values.get("rope_parameters")
    if not isinstance(nested, Mapping):
        return {}
    kind = nested.get("rope_type", "default")
    scaling = {k: v for k, v in nested.items() if k != "rope_theta"} if kind != "default" else None
    return {"rope_theta": nested.get("rope_theta", values.get("rope_theta")),
            "rope_scaling": scaling}


def check_attention(config: Any) -> None:
    """Raise VicugnaError unless every size is positive and heads divide as attention needs."""
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "num_key_value_heads", "head_dim",
                 "max_position_embeddings"):
        if getattr(config, name) < 1:
            raise VicugnaError(f"{name} is {getattr(config, name)}", "config.json",
                               "It must be at least 1")
    if config.num_attention_heads % config.num_key_value_heads:
        raise VicugnaError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}", "config.json",
            "Choose key/value heads that divide the query heads")
    if config.head_dim % 2:
        raise VicugnaError(f"head_dim {config.head_dim} is odd", "config.json",
                           "Rotary embedding needs an even head_dim")
