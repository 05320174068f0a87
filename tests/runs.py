"""A run even smaller than that of recipes/tiny.yaml, and how processes that run it end."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
SOURCE = '{source: stdlib, limit_bytes: 60000}'
SMALLER = (
    "stages.tokenizer.vocab_size=320", "stages.tokenizer.bytes_per_source=30000",
    f"data.sources=[{SOURCE}]", "stages.pretrain.steps=4", "stages.pretrain.checkpoint_every=2",
    "stages.pretrain.validate_every=2", "stages.sft.steps=4", "stages.sft.checkpoint_every=2",
    "stages.sft.validation_rows=0", "stages.sft.sequence_length=256", "stages.sft.rows=2",
    "stages.rl.steps=2", "stages.rl.prompts=2", "stages.rl.max_new_tokens=6",
    "stages.eval.batch=3",
    "stages.eval.groups=[{group: steps, task: reasoning.steps, n: 5, max_new_tokens: 4},"
    " {group: needle, task: retrieval.single, n: 2, length_tokens: 200, difficulty: {position: "
    "0.5}, max_new_tokens: 4}]")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of an error: nothing on standard output, no traceback."""
        assert self.out == "" and "Traceback" not in self.err, self
        lines = [line for line in self.err.splitlines() if line.startswith("vicugna: ")]
        assert len(lines) == 1 and self.err.endswith(f"{lines[0]}\n"), self.err
        return lines[0]


def arguments(folder: Path, *settings: str, recipe: Path = RECIPE) -> list[str]:
    """`run` with the smaller recipe."""
    chosen = [part for setting in (*SMALLER, *settings) for part in ("--set", setting)]
    return ["run", str(recipe), "--out", str(folder), *chosen]


def start(*command: str, **how: Any) -> subprocess.Popen[str]:
    """A process of the command line."""
    return subprocess.Popen(
        [sys.executable, "-m", "vicugna", *command], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)


def run_to_its_end(folder: Path, *settings: str, recipe: Path = RECIPE) -> Ended:
    """Run the smaller recipe in another process, to its end."""
    process = start(*arguments(folder, *settings, recipe=recipe), "--json")
    out, err = process.communicate(timeout=250)
    return Ended(process.returncode, out, err)


def made_by(folder: Path) -> dict[str, Any]:
    """All that must be the same however often a run was killed."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        stable = "/checkpoint/" in name or path.name in ("results.json", "items.jsonl", "plan.json")
        if path.is_file() and stable:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in folder.glob("*/metrics.jsonl"):
        rows = map(json.loads, path.read_text().splitlines())
        found[path.parent.name] = [[row["step"], row["loss"], row["grad_norm"], row["tokens"]]
                                   for row in rows]
    manifest = json.loads((folder / "06-release" / "release" / "manifest.json").read_text())
    return found | {key: manifest[key] for key in ("release_digest", "model_digest")}
