"""The contents of a release folder, and the model card and manifest that follow from them."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from vicugna import checkpoint
from vicugna.checkpoint import Checkpoint
from vicugna.checkpoint.folder import inside
from vicugna.dtypes import dtype_of
from vicugna.errors import VicugnaError
from vicugna.evals import Results, read_results
from vicugna.files import digest_file, digest_of, read_json
from vicugna.ledger import Attempt, attempts_in, lineage
from vicugna.models import counts

MANIFEST = "manifest.json"
# What Git, the Hub's client and (in any folder) macOS put beside a release; none of it is loaded.
IGNORED = (".git", ".gitattributes", ".gitignore", ".cache/huggingface", ".huggingface")
IGNORED_ANYWHERE = ".DS_Store"
WEAK = 0.5  # rows below this accuracy are listed as weaknesses


@dataclass(frozen=True)
class About:
    """Metadata of a release: its name, a summary, known limits, and the licence (an SPDX name).
    `attempts` counts all attempts of the workspace's ledger by kind and outcome."""

    name: str
    summary: str = ""
    limits: list[str] = field(default_factory=list)
    licence: str = "Apache-2.0"
    attempts: dict[str, int] = field(default_factory=dict)


class Contents:
    """The parts of a release, each read on first use. A forged file may raise anything."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.evidence = folder, folder / "evidence"

    @cached_property
    def files(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Size and digest of the files that the manifest must name, and what is ignored."""
        return files_in(self.folder)

    @cached_property
    def stated(self) -> dict[str, Any]:
        """What manifest.json says; VicugnaError if it is none."""
        content = read_json(self.folder / MANIFEST)
        if not isinstance(content, dict) or content.get("format") != 1 or "files" not in content:
            raise VicugnaError("not a release's manifest of this version",
                               str(self.folder / MANIFEST), "Check that this folder is a release")
        return content

    @cached_property
    def evaluations(self) -> list[tuple[Results, list[dict[str, Any]]]]:
        return [read_results(folder) for folder in sorted(self.evidence.glob("eval-*"))]

    @cached_property
    def model(self) -> Checkpoint:
        """The model as it was evaluated: its digest covers the precision it is loaded in."""
        (precision,) = {results.precision for results, _ in self.evaluations}
        return checkpoint.read(self.folder, dtype=dtype_of(precision, "precision of the results"))

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in
                (self.evidence / "ledger.jsonl").read_bytes().splitlines()]

    @cached_property
    def attempts(self) -> list[Attempt]:
        return attempts_in(self.rows)


def card(release: Contents) -> str:
    """README.md of a release: every number is computed from the evidence. A pure function:
    verification renders it again and compares the bytes."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True,
                                     keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = lambda value, form: (
        format(value, form) if isinstance(value, int | float) else "not recorded")
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        about=About(**read_json(release.evidence / "about.json")),
        config=release.model.config.to_dict(),
        recipe=(release.evidence / "recipe.yaml").read_text(encoding="utf-8").strip(),
        model_digest=release.model.digest, weak=WEAK,
        parameters=counts.parameters(release.model.network),
        context=release.model.config.context_length,
        evaluations=[results for results, _ in release.evaluations],
        training=lineage(release.attempts, release.model.digest))


def manifest(release: Contents) -> dict[str, Any]:
    """manifest.json of a release. The release digest covers weights, scores and recipe, but no
    times or costs: a run that was killed and resumed gives the same one."""
    what = {"model_digest": release.model.digest,
            "results_digests": [results.digest for results, _ in release.evaluations],
            "recipe_digest": digest_file(release.evidence / "recipe.yaml")}
    return {"format": 1, **what, "release_digest": digest_of(what), "files": release.files[0]}


def files_in(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """sha256 and size of every file of a release but the manifest, by its path within it; and the
    names of what is ignored (see IGNORED). A link is a VicugnaError, for what it leads to is not
    in the release, unless it is one of the Hub's cache, in which all files are links."""
    found, ignored, folders = dict[str, dict[str, Any]](), list[str](), [folder]
    for parent in folders:  # which grows
        for path in sorted(parent.iterdir()):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink() and inside(folder, name).resolve().is_relative_to(
                    folder.resolve()):
                raise VicugnaError("a link", str(path), "Put the file itself there")
            if name in IGNORED or path.name == IGNORED_ANYWHERE:
                ignored.append(name)
            elif path.is_dir():
                folders.append(path)
            elif not path.is_file():
                raise VicugnaError("neither file nor folder", str(path), "Remove it")
            elif name != MANIFEST:
                found[name] = {"sha256": digest_file(path), "size": path.stat().st_size}
    return found, ignored
