"""Making a release: one folder in which every number is bound to the bytes beside it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vicugna.errors import Refused, VicugnaError
from vicugna.evals import read_results
from vicugna.files import canonical, replacing_folder, write_json, write_text
from vicugna.release import card
from vicugna.release.contents import About, Contents
from vicugna.release.ledger import Ledger, attempts_in, lineage
from vicugna.release.manifest import NAME, manifest
from vicugna.release.verify import evaluating, verify

MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
               "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
               "chat_template.jinja", "modeling_*.py")


def make_release(model_folder: str | Path, results_folders: Sequence[str | Path], ledger: Ledger,
                 recipe: str | Path, out_folder: str | Path, about: About) -> dict[str, Any]:
    """Write a release to `out_folder` (atomically) and return its manifest.

    Raises Refused, with nothing written, when an evaluation is not complete or not of these
    weights, when the ledger is broken or does not know the weights or the evaluations, or when
    the finished folder does not verify.
    """
    if problem := ledger.check():
        raise Refused(f"the ledger is broken: {problem}", str(ledger.path), "Restore it")
    if not results_folders:
        raise Refused("no evaluation", str(out_folder), "Evaluate the model first")
    for folder in results_folders:
        try:
            read_results(folder)
        except VicugnaError as error:
            raise Refused(error.what, error.where, error.fix) from error
    with replacing_folder(out_folder) as temporary:
        _gather(temporary, Path(model_folder), results_folders, Path(recipe))
        release = Contents(temporary)
        _extract(release, ledger, about)
        write_text(temporary / "README.md", card.render(release))
        content = manifest(release)
        write_json(temporary / NAME, content)
        for check in verify(temporary, sample=0):
            if not check.ok:
                raise Refused(f"{check.name}: {check.detail}", str(out_folder),
                              "Evaluate these very weights in this workspace, then release them")
    return content


def _gather(target: Path, model_folder: Path, results_folders: Sequence[str | Path],
            recipe: Path) -> None:
    for pattern in MODEL_FILES:
        for path in sorted(model_folder.glob(pattern)):
            shutil.copyfile(path, target / path.name)
    for number, folder in enumerate(results_folders, start=1):
        evidence = target / "evidence" / f"eval-{number:02}"
        evidence.mkdir(parents=True)
        for name in ("results.json", "items.jsonl"):
            shutil.copyfile(Path(folder) / name, evidence / name)
    shutil.copyfile(recipe, target / "evidence" / "recipe.yaml")


def _extract(release: Contents, ledger: Ledger, about: About) -> None:
    """Write the ledger's rows about these weights and their evaluations, and the counts of all."""
    rows = ledger.rows()
    attempts = attempts_in(rows)
    wanted = {attempt.id for attempt in lineage(attempts, release.model.digest)}
    for results, _ in release.evaluations:
        wanted |= {attempt.id for attempt in evaluating(attempts, results)[-1:]}
    extract = [row for row in rows if row["content"]["attempt"] in wanted]
    write_text(release.evidence / "ledger.jsonl",
               "".join(canonical(row).decode() + "\n" for row in extract))
    counts = Counter(f"{attempt.kind} {attempt.outcome}" for attempt in attempts)
    write_json(release.evidence / "about.json", asdict(replace(about, attempts=dict(counts))))
