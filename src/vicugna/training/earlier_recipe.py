"""Recipes of the form before 0.1, in which each kind of stage was one key: shown in today's."""

import json
from typing import Any

from vicugna.errors import VicugnaError

KINDS = ("tokenizer", "pretrain", "sft", "rl", "eval", "release")


def refuse(values: dict[str, Any], path: str) -> None:
    """Raise VicugnaError if a recipe is of that form, with its stages as one line of YAML (in the
    form of JSON)."""
    if found := [kind for kind in KINDS if kind in values]:
        raise VicugnaError(f"stages are a list now, not keys of their own ({', '.join(found)})",
                           path, f"Write in their place: {_stages(values)}")


def _stages(values: dict[str, Any]) -> str:
    stages = {kind: {"kind": kind, **_object(values.get(kind))} for kind in KINDS
              if isinstance(values.get(kind), dict)}
    if "release" in stages and "name" in stages["release"]:
        stages["release"]["title"] = stages["release"].pop("name")
    if not _object(values.get("model")).get("start"):
        corpus = [one["source"] for one in _sources(values.get("data"))]
        learned = {"corpus": {"source": "corpus"}} if corpus else {}
        for one in _sources(stages.get("pretrain")) + _sources(stages.get("sft")):
            if one["source"] not in corpus:  # the tokenizer learned from it, too
                learned[one["source"]] = {key: value for key, value in one.items()
                                          if key not in ("weight", "form")}
        tokenizer = {"kind": "tokenizer", **stages.pop("tokenizer", {})}
        stages = {"tokenizer": tokenizer | {"sources": [*learned.values()]}, **stages}
    else:
        stages.pop("tokenizer", None)
    return f"stages: {json.dumps([*stages.values()], ensure_ascii=False, default=str)}"


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _sources(spec: Any) -> list[dict[str, Any]]:
    listed = _object(spec).get("sources")
    every = [{"source": one} if isinstance(one, str) else _object(one)
             for one in (listed if isinstance(listed, list) else [])]
    return [one for one in every if isinstance(one.get("source"), str)]
