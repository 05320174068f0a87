"""Making a release: one folder in which every number is bound to the bytes beside it."""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vicugna.checkpoint.hf import directory
from vicugna.errors import Refused, VicugnaError
from vicugna.evals import read_results
from vicugna.files import canonical, replacing_folder, write_json, write_text
from vicugna.ledger import Ledger, attempts_in, lineage
from vicugna.release.contents import MANIFEST, About, Contents, card, manifest
from vicugna.release.verify import evaluation_attempts, verify


def make_release(model_folder: str | Path, results_folders: Sequence[str | Path], ledger: Ledger,
                 recipe: str | Path, out_folder: str | Path, about: About) -> dict[str, Any]:
    """Write a release to `out_folder` (atomically) and return its manifest.

    Raises Refused, with nothing written, when an evaluation is not complete, the ledger is broken,
    or the finished folder does not verify.
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
        for path in directory.files_in(Path(model_folder)):
            (copy := temporary / path.relative_to(model_folder)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        release = Contents(temporary)
        for number, folder in enumerate(results_folders, start=1):
            (evidence := release.evidence / f"eval-{number:02}").mkdir(parents=True)
            for name in ("results.json", "items.jsonl"):
                shutil.copyfile(Path(folder) / name, evidence / name)
        shutil.copyfile(recipe, release.evidence / "recipe.yaml")
        rows = ledger.rows()
        attempts = attempts_in(rows)
        cited = {attempt.id for attempt in lineage(attempts, release.model.digest)}
        for results, _ in release.evaluations:
            cited |= {attempt.id for attempt in evaluation_attempts(attempts, results)[-1:]}
        write_text(release.evidence / "ledger.jsonl", "".join(
            canonical(row).decode() + "\n" for row in rows if row["content"]["attempt"] in cited))
        counts = Counter(f"{attempt.kind} {attempt.outcome}" for attempt in attempts)
        write_json(release.evidence / "about.json", asdict(replace(about, attempts=dict(counts))))
        write_text(temporary / "README.md", card(release))
        content = manifest(release)
        write_json(temporary / MANIFEST, content)
        for check in verify(temporary, sample=0):
            if not check.ok:
                raise Refused(f"{check.name}: {check.detail}", str(out_folder),
                              "Evaluate these very weights in this workspace, then release them")
    return content
