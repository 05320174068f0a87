"""report.html: one self-contained page that shows what a run did and what came of it.

Parts for which the run folder has no files are left out. Everything that a model or a user wrote is
untrusted: Jinja and matplotlib escape it, and the page forbids scripts.
"""

import io
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup

from vicugna.errors import VicugnaError
from vicugna.evals import PlannedItem, Results, Row, read_results
from vicugna.evals.runner import make_item
from vicugna.files import read_json, storage_error, write_text
from vicugna.ledger import Ledger
from vicugna.models import counts

STAGE = re.compile(r"(\d+)-([A-Za-z][A-Za-z0-9_-]*)")
LOSS = {"loss": "training", "validation_loss": "validation"}
PANELS = (("pretrain", "loss", LOSS), ("sft", "loss", LOSS),
          ("rl", "reward", {"reward": "mean reward", "truncated": "replies cut at the limit"}),
          ("rl", "tokens in a reply", {"length": "mean"}))
TITLES = {"tokenizer": "Tokenizer", "pretrain": "Pretraining", "sft": "Fine-tuning",
          "rl": "Reinforcement learning", "eval": "Evaluation", "release": "Release"}
SAMPLES = 3  # tasks of which a right answer is shown, and as many with another outcome
Scored = tuple[str, Results, list[dict[str, Any]]]  # a checkpoint's name, results, records

# Figures are drawn in these colours, which then become the page's variables: it may be dark.
TEXT, SOFT, LINE, SERIES = "#221d18", "#6f665b", "#e5ded3", ("#a9532a", "#2b6f77")
VARIABLES = {TEXT: "text", SOFT: "soft", LINE: "line", SERIES[0]: "series-0", SERIES[1]: "series-1"}
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "vicugna", "text.parse_math": False,
         "font.size": 9, "text.color": TEXT, "axes.edgecolor": LINE, "axes.labelcolor": SOFT,
         "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": SOFT,
         "ytick.labelcolor": SOFT, "grid.color": LINE, "axes.grid": True, "axes.axisbelow": True,
         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def write_report(run_folder: Path, ledger_path: Path) -> Path:
    """Write `run_folder`/report.html (atomically) from what is there, and give its path.

    The same files give the same bytes. A broken ledger is reported on the page. Raises VicugnaError
    if something in the run cannot be read, or the page cannot be written.
    """
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
    environment.filters |= {"finite": finite, "number": lambda value, form=",.0f": (
        "–" if finite(value) is None else format(value, form))}
    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    write_text(run_folder / "report.html", environment.from_string(template).render(page))
    return run_folder / "report.html"


def _page(run_folder: Path) -> dict[str, Any]:
    recipe = run_folder / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else ""
    settings: dict[str, Any] = {}
    with suppress(yaml.YAMLError):
        settings = _object(yaml.safe_load(text))
    specs = {spec["name"]: spec for spec in settings.get("stages", ())}
    folders = _folders(run_folder, set(specs))
    kinds = {name: specs[name]["kind"] if name in specs else name for name in folders}
    titles = {name: TITLES.get(kind, kind) + f" ({name})" * (kind != name)
              for name, kind in kinds.items()}
    metrics = {name: _lines(path / "metrics.jsonl") for name, path in folders.items()}
    scored = _scored(folders, kinds)
    latest = list(folders.values())[::-1]
    return {
        "folder": run_folder.resolve().name, "recipe": text, "settings": settings,
        "title": [spec["title"] for spec in specs.values() if "title" in spec][-1:],
        "trained": max((spec.get("sequence_length", 0) for spec in specs.values()), default=0),
        "scored": scored, "compared": _compared(scored), "samples": _samples(scored),
        "metrics": metrics, "curves": _curves(metrics, kinds, titles), "titles": titles,
        "kinds": kinds, "stages": {name: _read(path / "stage.json")
                                   for name, path in folders.items()},
        "manifest": _first(path / "release" / "manifest.json" for path in latest),
        "network": _network(_first(path / made / "config.json" for made in ("release", "checkpoint")
                                   for path in latest))}


def _folders(run_folder: Path, wanted: set[str]) -> dict[str, Path]:
    """The stages' folders, by name and in order: those of the recipe, where it can be read."""
    found = [(int(match[1]), match[2], path) for path in run_folder.iterdir() if path.is_dir()
             for match in [STAGE.fullmatch(path.name)] if match]
    return {name: path for _, name, path in sorted(found) if not wanted or name in wanted}


def finite(value: Any) -> float | None:
    """A value from a file as a number, or None where it is none that can be shown."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    return _object(read_json(path)) if path.exists() else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError, RecursionError):  # its last line may be incomplete
            found.append(_object(json.loads(line)))
    return found


def _first(paths: Iterable[Path]) -> dict[str, Any]:
    """The object in the first of these JSON files that is there."""
    return next(filter(None, map(_read, paths)), {})


def _network(config: dict[str, Any]) -> dict[str, Any]:
    """config.json, and how many "parameters" and which "context_length" that makes."""
    if not config:
        return {}
    network: Any = counts.shaped(config)
    return {**config, "parameters": counts.parameters(network),
            "context_length": network.config.context_length}


def _scored(folders: Mapping[str, Path], kinds: Mapping[str, str]) -> list[Scored]:
    """The finished evaluations, the earliest checkpoint's first. A checkpoint that several stages
    score is named with the stage."""
    found = [(path.parent.name, stage, path.parent) for stage, folder in folders.items()
             if kinds[stage] == "eval" for path in sorted(folder.glob("*/results.json"))]
    order, times = list(folders), Counter(name for name, _, _ in found)
    found.sort(key=lambda one: order.index(one[0]) if one[0] in order else -1)  # start is none
    return [(name if times[name] == 1 else f"{name}, {stage}", *read_results(path))
            for name, stage, path in found]


def _compared(scored: Sequence[Scored]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """What each checkpoint scored on each row of reasoning, by its name."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for name, row in [(name, row) for name, results, _ in reversed(scored) for row in results.rows]:
        if row.task.startswith("reasoning."):
            found.setdefault((row.group, row.task, row.difficulty), {})[name] = row
    return found


def _samples(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """The first reasoning items of the plan that the last checkpoint got right, then those it did
    not, each of another task, with every checkpoint's record of them."""
    found: dict[tuple[bool, str], dict[str, Any]] = {}
    for record in scored[-1][2] if scored else []:
        key = record["outcome"] != "right", record["task"]
        if key not in found and record["task"].startswith("reasoning.") and sum(
                other == key[0] for other, _ in found) < SAMPLES:
            planned = PlannedItem.from_dict(record)
            found[key] = {"planned": planned, "by": {
                name: other for name, _, records in scored for other in records
                if other["id"] == record["id"]}}
            with suppress(VicugnaError):  # another version may not make this question
                found[key]["item"] = make_item(planned)
    return [found[key] for key in sorted(found, key=lambda key: key[0])]


def _curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]], kinds: Mapping[str, str],
            titles: Mapping[str, str]) -> list[tuple[str, str, Markup]]:
    """(stage, title, figure) for what was recorded."""
    return [(stage, f"{titles[stage]}: {what}", _figure(rows, labels))
            for stage, rows in metrics.items() for kind, what, labels in PANELS
            if kind == kinds[stage]
            and any(finite(row.get(k)) is not None for row in rows for k in labels)]


def _figure(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> Markup:
    """Raw values faint and smoothed ones over them, or points where there are few, as an SVG."""
    from matplotlib import style  # takes a second, which no other command should wait
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the measuring font does not have
        figure, file = Figure((5, 2.6), layout="constrained"), io.StringIO()
        axes = figure.add_subplot()
        for (key, label), colour in zip(labels.items(), SERIES, strict=False):
            pairs = [(row.get("step"), row.get(key)) for row in rows]
            points = [pair for pair in pairs if None not in map(finite, pair)]
            if not points:
                continue
            x, y = np.array(points, float)[:: 1 + len(points) // 2000].T
            if len(points) < max(8, len(pairs) / 2):
                axes.plot(x, y, "o-", color=colour, markersize=3.5, linewidth=1, label=label)
            else:
                near = np.ones(2 * (len(y) // 80) + 3)
                mean = np.convolve(y, near, "same") / np.convolve(y * 0 + 1, near, "same")
                axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.3)
                axes.plot(x, mean, color=colour, linewidth=1.8, label=label)
        axes.set_xlabel("step")
        axes.legend(loc="best")
        figure.savefig(file, format="svg", transparent=True,
                       metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = re.sub(r'<g id="[^"]*"', "<g", file.getvalue().partition("<svg")[2])
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return Markup("<svg" + text)
