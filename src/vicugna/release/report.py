"""report.html: one self-contained page that shows what a run did and what came of it.

What the run folder does not hold is left out. All that a model or a user wrote is hostile text:
Jinja escapes it, and the page forbids scripts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from markupsafe import Markup

from vicugna import models
from vicugna.errors import VicugnaError
from vicugna.evals import PlannedItem, Results, Row, read_results
from vicugna.evals.runner import make
from vicugna.evals.statistics import interval
from vicugna.files import read_json, storage_error, write_text
from vicugna.release import figures
from vicugna.release.ledger import Ledger
from vicugna.tasks import Item

STAGE = re.compile(r"\d\d-(tokenizer|pretrain|sft|rl|eval|release)")
ORDER = ("pretrain", "sft", "rl")  # how checkpoints follow from each other
LOSS = {"loss": "training", "validation_loss": "validation"}
PANELS = (("pretrain", "Pretraining: loss", LOSS), ("sft", "Fine-tuning: loss", LOSS),
          ("rl", "Reinforcement learning: reward",
           {"reward": "mean reward", "truncated": "share of replies cut at the limit"}),
          ("rl", "Reinforcement learning: reply length, tokens", {"length": "tokens"}))
SAMPLES = 3  # tasks of which one right answer is shown, and one other
LONGEST = 1200  # characters of a question that are shown
Scored = tuple[str, Results, list[dict[str, Any]]]  # checkpoint's name, results, records


def write_report(run_folder: Path, ledger_path: Path) -> Path:
    """Write `run_folder`/report.html (atomically) from what is there, and give its path.

    The same files give the same bytes. A broken ledger is told of on the page. Raises VicugnaError
    if something in the run cannot be read, or the page cannot be written.
    """
    run_folder, ledger_path = Path(run_folder), Path(ledger_path)
    try:
        page = _page(run_folder)
    except OSError as error:
        raise storage_error(error, error.filename or run_folder) from error
    if ledger_path.exists():
        try:
            ledger = Ledger(ledger_path)
            page |= {"chain": ledger.check() or "intact", "attempts": ledger.attempts()}
        except VicugnaError as error:
            page["chain"] = str(error)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined,
                                     trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "time": _time, "finite": finite}
    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    write_text(run_folder / "report.html", environment.from_string(template).render(page))
    return run_folder / "report.html"


def _page(run_folder: Path) -> dict[str, Any]:
    folders = {found[1]: path for path in sorted(run_folder.iterdir())
               if path.is_dir() and (found := STAGE.fullmatch(path.name))}
    released = folders.get("release", run_folder) / "release"
    recipe, settings = _recipe(run_folder / "recipe.yaml")
    metrics = {name: _lines(path / "metrics.jsonl") for name, path in folders.items()}
    scored = _scored(folders["eval"]) if "eval" in folders else []
    trained = max(finite(_object(settings.get(stage)).get("sequence_length")) or 0
                  for stage in ("pretrain", "sft"))
    lengths = _lengths(scored[-1][2]) if scored else []
    names, compared = [name for name, _, _ in scored], _compared(scored)
    return {
        "folder": run_folder.resolve().name, "recipe": recipe, "settings": settings,
        "network": _network([released, *(
            path / "checkpoint" for path in reversed(folders.values()))]),
        "manifest": _read(released / "manifest.json"), "metrics": metrics, "trained": trained,
        "stages": {name: _read(path / "stage.json") for name, path in folders.items()},
        "curves": _curves(metrics), "lengths": lengths, "heat": figures.heat_map(lengths, trained),
        "names": names, "scored": scored, "compared": compared,
        "dots": figures.dot_plot(names, [(f"{task.removeprefix('reasoning.')} · {difficulty}", by)
                                         for (_, task, difficulty), by in compared.items()]),
        "samples": _samples(scored)}


def finite(value: Any) -> float | None:
    """A value from a file as a number, or None where it is none that can be shown."""
    try:
        return value if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:
        return None


def _number(value: Any, form: str = ",.0f") -> str:
    return "–" if finite(value) is None else format(value, form)


def _time(seconds: Any) -> str:
    whole = round(finite(seconds) or 0)
    return (f"{_number(seconds, '.1f')} s" if whole < 100 else f"{whole // 60} min {whole % 60} s"
            if whole < 6000 else f"{whole // 3600} h {whole % 3600 // 60} min")


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    return _object(read_json(path)) if path.exists() else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file; a line that is still being written is none."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(_object(json.loads(line)))
        except (ValueError, RecursionError):
            continue
    return found


def _recipe(path: Path) -> tuple[str, dict[str, Any]]:
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    try:
        return text, _object(yaml.safe_load(text))
    except yaml.YAMLError:
        return text, {}


def _network(folders: Sequence[Path]) -> dict[str, Any]:
    """config.json of the first folder that has one, and how many "parameters" that makes."""
    for folder in folders:
        if config := _read(folder / "config.json"):
            with torch.device("meta"):
                network = models.build(config)
            return {**config, "parameters": sum(p.numel() for p in network.parameters())}
    return {}


def _curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, str, Markup]]:
    """(stage, title, figure) of every panel for which something was recorded."""
    found = []
    for stage, title, named in PANELS:
        steps = metrics.get(stage, ())
        lines = {name: [(row["step"], row[key]) for row in steps if finite(row.get("step"))
                        is not None and finite(row.get(key)) is not None]
                 for key, name in named.items()}
        if lines := {name: points for name, points in lines.items() if points}:
            found.append((stage, title, figures.curves(lines, len(steps))))
    return found


def _scored(folder: Path) -> list[Scored]:
    """The finished evaluations in a folder, the earliest checkpoint's first."""
    paths = [path.parent for path in folder.glob("*/results.json")]
    paths.sort(key=lambda path: (ORDER.index(path.name) if path.name in ORDER else -1, path.name))
    read = [(path.name, *read_results(path)) for path in paths]
    return [(name, replace(results, rows=sorted(results.rows, key=_natural)), records)
            for name, results, records in read]


def _natural(row: Row) -> list[Any]:
    """A sorting key by which "depth 10" comes after "depth 9"."""
    parts = re.split(r"(\d+(?:\.\d+)?)", f"{row.group}\n{row.task}\n{row.difficulty}")
    return [float(part) if k % 2 else part for k, part in enumerate(parts)]


def _lengths(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The single needles by length, shortest first; `cells` is {depth: (right, n)}."""
    columns: dict[int, list[Mapping[str, Any]]] = {}
    for record in records:
        if record["task"] == "retrieval.single":
            columns.setdefault(record["length_tokens"] or -record["difficulty"]["length"],
                               []).append(record)
    found = []
    for length, asked in columns.items():
        tokens = round(sum(record["prompt_tokens"] for record in asked) / len(asked))
        cells: dict[float, tuple[int, int]] = {}
        for record in asked:
            if (depth := record["difficulty"]["position"]) is not None:
                right, n = cells.get(depth, (0, 0))
                cells[depth] = right + (record["outcome"] == "right"), n + 1
        hits = [record["outcome"] == "right" for record in asked]
        found.append({
            "tokens": length if length > 0 else tokens, "n": len(hits), "cells": cells,
            "label": f"{length:,}" if length > 0 else f"~{tokens:,}", "right": sum(hits),
            "bounds": interval(hits, [record["cluster"] or record["id"] for record in asked])})
    return sorted(found, key=lambda column: column["tokens"])


def _compared(scored: Sequence[Scored]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """What each checkpoint scored on each row of reasoning, by its name."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for name, results, _ in reversed(scored):
        for row in results.rows:
            if row.task.startswith("reasoning."):
                found.setdefault((row.group, row.task, row.difficulty), {})[name] = row
    return found


def _samples(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """The first reasoning items of the plan that the last checkpoint got right, and those it did
    not, each of another task, with every checkpoint's record of them."""
    found, seen = [], {True: set[str](), False: set[str]()}
    for record in scored[-1][2] if scored else []:
        tasks = seen[record["outcome"] == "right"]
        if record["task"].startswith("reasoning.") and len(tasks - {record["task"]}) < SAMPLES:
            if record["task"] not in tasks:
                by = {name: other for name, _, records in scored for other in records
                      if other["id"] == record["id"]}
                found.append({"planned": PlannedItem.from_dict(record), "by": by,
                              "question": _question(record), "expected": record["expected"]})
            tasks.add(record["task"])
    return sorted(found, key=lambda one: one["by"][scored[-1][0]]["outcome"] != "right")


def _question(record: Mapping[str, Any]) -> str:
    """The question made again, "" if it cannot be; its middle left out where it is long."""
    try:
        item = make(PlannedItem.from_dict(record))
    except VicugnaError:
        return ""
    text = item.messages[-1]["content"] if isinstance(item, Item) else ""
    return re.sub(rf"(?s)^(.{{{LONGEST // 2}}}).+(.{{{LONGEST // 2}}})$", r"\1 […] \2", text)
