"""The table of an evaluation, error bars included, computed from its items' records alone."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date as Date
from pathlib import Path
from typing import Any

import numpy as np

from vicugna.errors import VicugnaError
from vicugna.evals.plan import Plan, PlannedItem
from vicugna.files import canonical, digest_of, disk_errors, read_json

OUTCOMES = ("right", "wrong", "error", "truncated")
IDENTITY = ("model_digest", "plan_digest", "date", "precision", "sampling", "batch_size",
            "batch_tokens")
FORMAT = 2  # 2 has the date, and matching.py's rule for user items


@dataclass(frozen=True)
class Row:
    """One group, task and difficulty. `accuracy` is right/n, `if_errors_right` (right + error)/n;
    `low` to `high` is the accuracy's 95% interval, got by `method`."""

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
    """A complete evaluation. `date` (ISO) is the day that the chat template saw; `tokens` counts
    the prompts' and the replies' tokens."""

    model_digest: str
    plan_digest: str
    items_digest: str
    date: str
    precision: str
    sampling: dict[str, Any]
    batch_size: int
    batch_tokens: int
    tokens: int
    rows: list[Row]
    platform: str

    @classmethod
    def of(cls, identity: Mapping[str, Any], records: Sequence[Mapping[str, Any]],
           platform: str) -> "Results":
        """Count `records`. Raises VicugnaError if they are not, one for one, the planned items."""
        plan = [PlannedItem.from_dict(record) for record in records]
        if Plan(plan, Date.fromisoformat(identity["date"])).digest != identity["plan_digest"]:
            raise VicugnaError("the items are not exactly the planned ones", "evaluation",
                               "Finish the evaluation, or run it again in a new folder")
        groups: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
        for item, record in zip(plan, records, strict=True):
            groups.setdefault(item.row, []).append((record["outcome"], item.cluster or item.id))
        return cls(**{key: identity[key] for key in IDENTITY}, items_digest=digest_of(records),
                   tokens=sum(r["prompt_tokens"] + r["tokens"] for r in records),
                   rows=[_row(key, groups[key]) for key in sorted(groups, key=_natural)],
                   platform=platform)

    @property
    def digest(self) -> str:
        """SHA-256 over everything but the platform: a resumed evaluation has the same."""
        return digest_of({k: v for k, v in asdict(self).items() if k != "platform"})

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "results_digest": self.digest}


def _natural(key: tuple[str, ...]) -> list[Any]:
    """A sorting key by which "depth 10" comes after "depth 9"."""
    parts = re.split(r"(\d+(?:\.\d+)?)", "\n".join(key))
    return [float(part) if k % 2 else part for k, part in enumerate(parts)]


def _row(key: tuple[str, str, str], ended: Sequence[tuple[str, str]]) -> Row:
    outcomes, clusters = zip(*ended, strict=True)
    n, (right, wrong, error, truncated) = len(ended), map(outcomes.count, OUTCOMES)
    low, high, method = interval([outcome == "right" for outcome in outcomes], clusters)
    # Six digits, so that another version of scipy gives the same digest.
    return Row(*key, n, right, wrong, error, truncated, round(right / n, 6),
               round((right + error) / n, 6), round(low, 6), round(high, 6), method)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of an items.jsonl; VicugnaError names the line that is not one."""
    with disk_errors(path):
        lines = Path(path).read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            item = PlannedItem.from_dict(record)
            if (record["id"] != item.id or record["outcome"] not in OUTCOMES
                    or type(record["tokens"]) is not int or canonical(record) != line):
                raise ValueError("its id, outcome, number of tokens or form was changed")
        except (ValueError, KeyError, TypeError, VicugnaError, RecursionError) as error:
            raise VicugnaError(f"not an item's record: {error}", f"{path} line {number}",
                               "Run the evaluation again in a new folder") from error
        records.append(record)
    return records


def read_results(folder: str | Path) -> tuple[Results, list[dict[str, Any]]]:
    """A finished evaluation and its records; VicugnaError if its table is not what follows."""
    path = Path(folder) / "results.json"
    if not path.exists():
        raise VicugnaError("the evaluation is not complete", str(folder), "Run it to its end")
    content, records = read_json(path), read_records(Path(folder) / "items.jsonl")
    if isinstance(content, dict) and content.get("format") != FORMAT:
        raise VicugnaError(f"results of format {content.get('format')}, not {FORMAT}", str(path),
                           "Evaluate again in another folder, or use the version that made them")
    try:
        results = Results.of(content, records, str(content["platform"]))
        for key, value in results.to_dict().items():
            if content[key] != value:
                raise ValueError(f"{key} does not follow from items.jsonl")
    except (KeyError, TypeError, ValueError) as error:
        raise VicugnaError(f"not an evaluation's results: {error}", str(path),
                           "Run the evaluation again") from error
    return results, records


def interval(right: Sequence[bool], clusters: Sequence[str]) -> tuple[float, float, str]:
    """95% interval for the mean of `right`: (low, high, method), both in 0..1.

    `clusters[i]` names what item i shares with others (a haystack, say). Where nobody shares, this
    is Wilson's interval; otherwise Wilson's at the effective number of items, n over the design
    effect, with the clustered variance of Miller (arXiv 2411.00640) and Student's quantile for the
    number of clusters. Where all are right or all wrong each cluster counts as one item.
    """
    from scipy.special import ndtri, stdtrit  # takes a second, which no other command should wait

    hits = np.asarray(right, dtype=float)
    n, p = len(hits), float(np.mean(hits))
    names, member = np.unique(np.asarray(clusters), return_inverse=True)
    count, effective, quantile = len(names), float(len(names)), float(ndtri(0.975))
    if count == 1 < n:  # one cluster does not show how clusters differ
        return 0.0, 1.0, "clustered"
    if count < n and 0 < p < 1:
        variance = np.square(np.bincount(member, weights=hits - p)).sum() / n ** 2
        effective = min(float(n), p * (1 - p) / variance) if variance > 0 else float(n)
        quantile = float(stdtrit(count - 1, 0.975))
    z2 = quantile ** 2 / effective
    centre = (p + z2 / 2) / (1 + z2)
    half = (z2 * (p * (1 - p) + z2 / 4)) ** 0.5 / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half), (
        "wilson" if count == n else "clustered")
