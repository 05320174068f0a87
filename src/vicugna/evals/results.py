"""The table of an evaluation, computed from its items' records and from nothing else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vicugna.errors import VicugnaError
from vicugna.evals.plan import PlannedItem, plan_digest
from vicugna.evals.statistics import interval
from vicugna.files import canonical, digest_of, read_json, storage_error

OUTCOMES = ("right", "wrong", "error", "truncated")


@dataclass(frozen=True)
class Row:
    """One group, task and difficulty. `accuracy` is right/n, so errors count as wrong, and
    `if_errors_right` what it would be had they all been right; `low` to `high` is the accuracy's
    95% interval, got by `method`."""

    group: str
    task: str
    difficulty: str
    n: int
    right: int
    wrong: int
    error: int
    truncated: int
    accuracy: float
    if_errors_right: float
    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Results:
    """A complete evaluation. `tokens` counts the prompts' and the replies' tokens."""

    model_digest: str
    plan_digest: str
    items_digest: str
    precision: str
    sampling: dict[str, Any]
    batch_size: int
    batch_tokens: int
    tokens: int
    rows: list[Row]
    platform: str

    @classmethod
    def of(cls, identity: Mapping[str, Any], records: Sequence[Mapping[str, Any]],
           platform: str) -> Results:
        """Count `records`. Raises VicugnaError if they are not, one for one, the planned items."""
        plan = [PlannedItem.from_dict(record) for record in records]
        if plan_digest(plan) != identity["plan_digest"]:
            raise VicugnaError("the items are not the planned ones, each once", "evaluation",
                               "Finish the evaluation, or run it again in a new folder")
        groups: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
        for item, record in zip(plan, records, strict=True):
            groups.setdefault(item.row, []).append((record["outcome"], item.cluster or item.id))
        return cls(
            **{key: identity[key] for key in ("model_digest", "plan_digest", "precision",
                                              "sampling", "batch_size", "batch_tokens")},
            items_digest=digest_of(list(records)),
            tokens=sum(r["prompt_tokens"] + r["tokens"] for r in records),
            rows=[_row(key, groups[key]) for key in sorted(groups)], platform=platform)

    @property
    def digest(self) -> str:
        """SHA-256 over everything but the platform: a resumed evaluation has the same."""
        return digest_of({k: v for k, v in asdict(self).items() if k != "platform"})

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self), "results_digest": self.digest}


def _row(key: tuple[str, str, str], ended: Sequence[tuple[str, str]]) -> Row:
    n, count = len(ended), Counter(outcome for outcome, _ in ended)
    low, high, method = interval([outcome == "right" for outcome, _ in ended],
                                 [cluster for _, cluster in ended])
    # Six digits, so that another version of scipy gives the same digest.
    return Row(*key, n, count["right"], count["wrong"], count["error"], count["truncated"],
               round(count["right"] / n, 6), round((count["right"] + count["error"]) / n, 6),
               round(low, 6), round(high, 6), method)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of an items.jsonl; VicugnaError names the line that is not one."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise storage_error(error, path) from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            item = PlannedItem.from_dict(record)
            if record["id"] != item.id or canonical(record) != line:
                raise ValueError("its id is not the item's, or its form was changed")
            if record["outcome"] not in OUTCOMES or type(record["tokens"]) is not int:
                raise ValueError("its outcome or its number of tokens is none")
        except (ValueError, KeyError, TypeError, VicugnaError, RecursionError) as error:
            raise VicugnaError(f"not an item's record: {error}", f"{path} line {number}",
                               "Run the evaluation again in a new folder") from error
        records.append(record)
    return records


def read_results(folder: str | Path) -> tuple[Results, list[dict[str, Any]]]:
    """A finished evaluation and its records, the table computed anew from them.

    Raises VicugnaError when the evaluation is not complete, or its table is not what follows.
    """
    folder = Path(folder)
    if not (folder / "results.json").exists():
        raise VicugnaError("the evaluation is not complete", str(folder), "Run it to its end")
    content, records = read_json(folder / "results.json"), read_records(folder / "items.jsonl")
    try:
        results = Results.of(content, records, str(content["platform"]))
    except (KeyError, TypeError) as error:
        raise VicugnaError(f"not an evaluation's results: {error}", str(folder / "results.json"),
                           "Run the evaluation again") from error
    for key, value in results.to_dict().items():
        if content.get(key) != value:
            raise VicugnaError(f"{key} is not what follows from items.jsonl",
                               str(folder / "results.json"), "Run the evaluation again")
    return results, records
