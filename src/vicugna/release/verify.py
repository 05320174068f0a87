"""Verification: recomputes everything in a release and reports what does not agree.

Without a signature it cannot say who made a release, nor detect evidence that was fabricated whole
and consistently; it can show that these weights give these scores on these items.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vicugna import checkpoint, tasks
from vicugna.engine import Sampling
from vicugna.errors import Refused, VicugnaError
from vicugna.evals import PlannedItem, Results
from vicugna.evals.plan import split_batches
from vicugna.evals.runner import LocalModel, Reply, make_item, run_batch, score_reply
from vicugna.ledger import Attempt, intact, lineage
from vicugna.release.contents import Contents, card, manifest

AGREEMENT = 0.95  # least share of equal outcomes on another platform
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Check:
    """One check of a release: its name, whether it passed, and what it found."""

    name: str
    ok: bool
    detail: str


def verify(folder: str | Path, sample: int = 32, progress: Progress = lambda done, total: None
           ) -> list[Check]:
    """Check a release folder; it holds if every check is ok.

    `sample`: at least so many items, in whole batches drawn at random, are evaluated again (0:
    none). On the platform of the evaluation every record must be the same; on another, all but 5%
    of the outcomes (or one). `progress(done, total)` counts them.
    """
    release = Contents(Path(folder))
    parts: dict[str, Callable[[Contents], str]] = {
        "files": _files, "model": _model, "items": _items, "ledger": _ledger, "card": _card,
        "release digest": _digest}
    if sample:
        parts["sample"] = lambda release: _sample(release, sample, progress)
    checks = []
    for name, part in parts.items():
        try:
            checks.append(Check(name, True, part(release)))
        except Exception as error:  # a forged file may raise anything: the check fails
            known = isinstance(error, VicugnaError)
            checks.append(Check(name, False, str(error) if known else repr(error)))
    return checks


def evaluation_attempts(attempts: Sequence[Attempt], results: Results) -> list[Attempt]:
    """The finished attempts that gave `results`, entered with its plan and its weights."""
    return [one for one in attempts
            if (one.kind, one.outcome, one.data_digest) == ("eval", "done", results.plan_digest)
            and results.model_digest in one.parents
            and one.result.get("digest") == results.digest]


def _files(release: Contents) -> str:
    stated, (found, ignored) = release.stated["files"], release.files
    for name in sorted({*stated, *found}):
        if name not in found:
            raise Refused("missing", name, "Connect to the network to fetch it"
                          if release.folder.resolve().parent.name == "snapshots" else "")
        if stated.get(name) != found[name]:
            raise Refused("changed" if name in stated else "not in the manifest", name)
    return f"{len(found)} files as the manifest says" + (
        f"; ignored, as nothing in it is loaded: {', '.join(ignored)}" if ignored else "")


def _model(release: Contents) -> str:
    """Reading the evaluations recomputes their tables from their items."""
    for tensor in checkpoint.survey(release.folder).stored.values():
        if (name := tensor.file.relative_to(release.folder).as_posix()) not in release.files[0]:
            raise Refused("weights are read from a file that is not in the manifest", name)
    digest = release.model.digest
    for results, _ in release.evaluations:
        if results.model_digest != digest:
            raise Refused(f"the results are those of model {results.model_digest[:12]}, not of "
                          f"{digest[:12]}")
    rows = sum(len(results.rows) for results, _ in release.evaluations)
    return f"{rows} rows of results follow from the items and are of model {digest[:12]}"


def _items(release: Contents) -> str:
    """Each row has the first n seeds of its split, and each recorded reply has its score."""
    checked = custom = 0
    for _, records in release.evaluations:
        seeds: dict[Any, list[int]] = {}
        for record in records:
            planned = PlannedItem.from_dict(record)
            builtin = tasks.is_builtin(planned.task)
            seeds.setdefault(planned.row if builtin else planned.task, []).append(planned.seed)
            checked, custom = checked + builtin, custom + (not builtin)
            if builtin:
                _rescore(planned, record)
        for row, used in seeds.items():
            first = tasks.SPLITS[tasks.split_of(min(used))].start
            if sorted(used) != list(range(first, first + len(used))):
                raise Refused("its items are not the first of the split, each once", str(row))
    return f"{checked} items generated and scored again" + (
        f"; {custom} of the maker's own cannot be generated here" if custom else "")


def _rescore(planned: PlannedItem, record: dict[str, Any]) -> None:
    item = make_item(planned)
    expected: dict[str, Any] = {"outcome": "error", "score": None,
                                "error": record["error"] or "a message is missing"}
    if record["finish_reason"] and not isinstance(item, str):
        expected = score_reply(item, Reply(record["response"],
                                           finish_reason=record["finish_reason"]))
    if any(record[key] != value for key, value in expected.items()):
        raise Refused(f"recorded as {record['outcome']}, but the reply is {expected['outcome']}",
                      f"item {planned.id}")


def _ledger(release: Contents) -> str:
    before = None
    for row in release.rows:
        if not intact(row) or (before and before["seq"] + 1 == row["seq"]
                               and before["hash"] != row["previous"]):
            raise Refused("it or the row before it was changed", f"ledger row {row['seq']}")
        before = row
    if not lineage(release.attempts, release.model.digest):
        raise Refused("no attempt in the ledger made these weights")
    for results, _ in release.evaluations:
        if not evaluation_attempts(release.attempts, results):
            raise Refused("no attempt in the ledger, opened with this plan and these weights, gave "
                          f"the results {results.digest[:12]}")
    return f"{len(release.rows)} rows, {len(release.attempts)} attempts"


def _card(release: Contents) -> str:
    written = (release.folder / "README.md").read_bytes().split(b"\n")
    expected = card(release).encode().split(b"\n")
    for line, (one, other) in enumerate(zip_longest(written, expected), start=1):
        if one != other:
            raise Refused("it does not follow from the evidence", f"README.md line {line}")
    return "every byte follows from the evidence"


def _digest(release: Contents) -> str:
    expected = manifest(release)
    for key in expected.keys() - {"files"}:
        if release.stated.get(key) != expected[key]:
            raise Refused(f"{key} does not follow from weights, results and recipe")
    return str(expected["release_digest"])


def _sample(release: Contents, sample: int, progress: Progress) -> str:
    drawn = _draw(release, sample)
    total, done, elsewhere, differ = sum(len(batch) for _, batch in drawn), 0, 0, 0
    for results, batch in drawn:
        model = LocalModel(release.model, date.fromisoformat(results.date))
        again = run_batch(model, [PlannedItem.from_dict(record) for record in batch],
                          Sampling(**results.sampling))
        same_platform = results.platform == model.platform
        for old, new in zip(batch, again, strict=True):
            same = old == new if same_platform else all(
                old[key] == new[key] for key in ("outcome", "expected", "prompt_digest"))
            if same_platform and not same:
                raise Refused(f"recorded as {old['outcome']}; evaluated again it is "
                              f"{new['outcome']}, with another record", f"item {old['id']}")
            done, elsewhere, differ = done + 1, elsewhere + (not same_platform), differ + (not same)
        progress(done, total)
    if differ > max(1, (1 - AGREEMENT) * elsewhere):
        raise Refused(f"{differ} of {total} items have another outcome when evaluated again")
    return f"{total - differ} of {total} items have the same outcome when evaluated again" + (
        " (first evaluated on another platform)" if elsewhere else "")


def _draw(release: Contents, sample: int) -> list[tuple[Results, list[dict[str, Any]]]]:
    """Whole batches at random, which the maker of the release cannot foresee."""
    batches, drawn = [], list[tuple[Results, list[dict[str, Any]]]]()
    for results, records in release.evaluations:
        remaining, plan = iter(records), [PlannedItem.from_dict(record) for record in records]
        for planned in split_batches(plan, results.batch_size, results.batch_tokens):
            batch = [next(remaining) for _ in planned]
            if all(tasks.is_builtin(item.task) for item in planned):
                batches.append((results, batch))
    random.SystemRandom().shuffle(batches)
    while batches and sum(len(batch) for _, batch in drawn) < sample:
        drawn.append(batches.pop())
    return drawn
