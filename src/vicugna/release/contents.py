"""A release folder, opened: what its card is written from and what its verification looks at."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vicugna import checkpoint
from vicugna.checkpoint import Checkpoint
from vicugna.evals import Results, read_results
from vicugna.files import digest_file, read_json
from vicugna.release.ledger import Attempt, attempts_in

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class About:
    """What people say of a release: its name, one paragraph, known limits, and the licence (an
    SPDX name). `attempts` counts all attempts of the workspace's ledger by kind and outcome."""

    name: str
    summary: str = ""
    limits: list[str] = field(default_factory=list)
    licence: str = "Apache-2.0"
    attempts: dict[str, int] = field(default_factory=dict)


class Contents:
    """The parts of a release, each read when first asked for. A forged file may raise anything."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.evidence = folder, folder / "evidence"

    @cached_property
    def evaluations(self) -> list[tuple[Results, list[dict[str, Any]]]]:
        return [read_results(folder) for folder in sorted(self.evidence.glob("eval-*"))]

    @cached_property
    def model(self) -> Checkpoint:
        """The model as it was evaluated: its digest covers the precision it is loaded in."""
        (precision,) = {results.precision for results, _ in self.evaluations}
        return checkpoint.read(self.folder, dtype=PRECISIONS[precision])

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        text = (self.evidence / "ledger.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    @cached_property
    def attempts(self) -> list[Attempt]:
        return attempts_in(self.rows)

    @cached_property
    def about(self) -> About:
        return About(**read_json(self.evidence / "about.json"))

    @cached_property
    def recipe(self) -> str:
        return (self.evidence / "recipe.yaml").read_text(encoding="utf-8")

    @property
    def recipe_digest(self) -> str:
        return digest_file(self.evidence / "recipe.yaml")

    @property
    def results_digests(self) -> list[str]:
        return [results.digest for results, _ in self.evaluations]
