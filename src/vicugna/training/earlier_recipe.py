"""Recipes of the form before 0.1, in which each kind of stage was one key: shown in today's."""

import json
from typing import Any

from vicugna.errors import VicugnaError

KINDS = ("tokenizer", "pretrain", "sft", "rl", "eval", "release")


def refuse(values: dict[str, Any], path: str) -> None:
    """Raise VicugnaError if a recipe is of that form, with its stages as one line of YAML (in the
    form of JSON)."""
    if found := [kind for kind in KINDS if kind in values]:
        try:
            stages = json.dumps(_stages(values), ensure_ascii=False, default=str)
            fix = f"Write in their place: stages: {stages}"
        except (AttributeError, KeyError, TypeError):  # it was no recipe in that form either
            fix = "Write a list such as stages: [{kind: sft, steps: 100, sources: [mine.jsonl]}]"
        raise VicugnaError(f"stages are a list now, not keys of their own ({', '.join(found)})",
                           path, fix)


def _stages(values: dict[str, Any]) -> list[dict[str, Any]]:
    stages = {kind: {"kind": kind, **values[kind]} for kind in KINDS
              if values.get(kind) is not None}
    if "name" in stages.get("release", {}):
        stages["release"]["title"] = stages["release"].pop("name")
    tokenizer = stages.pop("tokenizer", {"kind": "tokenizer"})
    if (values.get("model") or {}).get("start"):
        return [*stages.values()]
    corpus = [one["source"] for one in _sources(values.get("data"))]
    learned = {"corpus": {"source": "corpus"}} if corpus else {}
    for one in _sources(stages.get("pretrain")) + _sources(stages.get("sft")):
        if one["source"] not in corpus:  # the tokenizer learned from it, too
            learned[one["source"]] = {key: value for key, value in one.items()
                                      if key not in ("weight", "form")}
    return [{**tokenizer, "sources": [*learned.values()]}, *stages.values()]


def _sources(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [{"source": one} if isinstance(one, str) else one
            for one in (spec or {}).get("sources", ())]
