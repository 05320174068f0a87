"""Verification: computes everything in a release anew and says what does not agree.

Without a signature it cannot say who made a release, nor detect evidence that was invented whole
and consistently; it can show that these weights give these scores on these questions.
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
from vicugna.release.contents import Contents, card, files_in, manifest, read_manifest

ELSEWHERE = 0.95  # share of sampled outcomes that must agree on another kind of machine
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Check:
    """One question asked of a release, whether the answer was yes, and the figures behind it."""

    name: str
    ok: bool
    detail: str


def verify(folder: str | Path, sample: int = 32, progress: Progress = lambda done, total: None
           ) -> list[Check]:
    """Check a release folder; it holds if every check is ok.

    `sample`: at least so many items, in whole batches drawn at random, are asked again of the
    model (0: none). On the platform of the evaluation every record must be the same; elsewhere
    all but 5% of the outcomes (or one). `progress(done, total)` counts them.
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
        except Exception as error:  # whatever a forged file provokes, the answer is no
            known = isinstance(error, VicugnaError)
            checks.append(Check(name, False, str(error) if known else repr(error)))
    return checks


def evaluating(attempts: Sequence[Attempt], results: Results) -> list[Attempt]:
    """The finished evaluations that gave `results`: entered with its plan and its weights."""
    return [one for one in attempts
            if (one.kind, one.outcome, one.data_digest) == ("eval", "done", results.plan_digest)
            and results.model_digest in one.parents
            and one.result.get("digest") == results.digest]


def _files(release: Contents) -> str:
    stated, (found, aside) = read_manifest(release.folder)["files"], files_in(release.folder)
    for name in sorted({*stated, *found}):
        if name not in found:
            raise Refused("missing", name, "Connect to the network to fetch it"
                          if release.folder.resolve().parent.name == "snapshots" else "")
        if stated.get(name) != found[name]:
            raise Refused("changed" if name in stated else "not in the manifest", name)
    return f"{len(found)} files as the manifest says" + (
        f"; left aside, for nothing in it is loaded: {', '.join(aside)}" if aside else "")


def _model(release: Contents) -> str:
    """The evaluations are read here too: their tables are counted again from their items."""
    for tensor in checkpoint.survey(release.folder).stored.values():
        if (name := tensor.file.relative_to(release.folder).as_posix()) not in release.files:
            raise Refused("weights are read from it, and it is not in the manifest", name)
    digest = release.model.digest
    for results, _ in release.evaluations:
        if results.model_digest != digest:
            raise Refused(f"the results are of {results.model_digest[:12]}, not of {digest[:12]}")
    rows = sum(len(results.rows) for results, _ in release.evaluations)
    return f"{rows} rows of results follow from the items and are of model {digest[:12]}"


def _items(release: Contents) -> str:
    """Each row asks the first n seeds of its split, and each recorded reply deserves its score."""
    checked = left = 0
    for _, records in release.evaluations:
        seeds: dict[Any, list[int]] = {}
        for record in records:
            planned = PlannedItem.from_dict(record)
            own = planned.task in tasks.TASKS
            seeds.setdefault(planned.row if own else planned.task, []).append(planned.seed)
            checked, left = checked + own, left + (not own)
            if own:
                _judge_again(planned, record)
        for row, asked in seeds.items():
            first = tasks.SPLITS[tasks.split_of(min(asked))].start
            if sorted(asked) != list(range(first, first + len(asked))):
                raise Refused("its questions are not the first of the split, each once", str(row))
    kept = f"; {left} of somebody's own cannot be made again here" if left else ""
    return f"{checked} questions made again and their replies scored again{kept}"


def _judge_again(planned: PlannedItem, record: dict[str, Any]) -> None:
    item = make_item(planned)
    due = {"outcome": "error", "score": None, "error": record["error"] or "a message is missing"}
    if record["finish_reason"] and not isinstance(item, str):
        due = score_reply(item, Reply(record["response"], finish_reason=record["finish_reason"]))
    if any(record[key] != value for key, value in due.items()):
        raise Refused(f"recorded as {record['outcome']}, but the reply is {due['outcome']}",
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
        if not evaluating(release.attempts, results):
            raise Refused("no attempt in the ledger, opened with this plan and these weights, gave "
                          f"the results {results.digest[:12]}")
    return f"{len(release.rows)} rows, {len(release.attempts)} attempts"


def _card(release: Contents) -> str:
    written = (release.folder / "README.md").read_bytes().split(b"\n")
    due = card(release).encode().split(b"\n")
    for line, (one, other) in enumerate(zip_longest(written, due), start=1):
        if one != other:
            raise Refused("it does not follow from the evidence", f"README.md line {line}")
    return "every byte follows from the evidence"


def _digest(release: Contents) -> str:
    stated, due = read_manifest(release.folder), manifest(release)
    for key in due.keys() - {"files"}:
        if stated.get(key) != due[key]:
            raise Refused(f"{key} does not follow from weights, results and recipe")
    return str(due["release_digest"])


def _sample(release: Contents, sample: int, progress: Progress) -> str:
    drawn = _draw(release, sample)
    total, done, elsewhere, differ = sum(len(batch) for _, batch in drawn), 0, 0, 0
    for results, batch in drawn:
        answerer = LocalModel(release.model, date.fromisoformat(results.date))
        again = run_batch(answerer, [PlannedItem.from_dict(record) for record in batch],
                    Sampling(**results.sampling))
        here = results.platform == answerer.platform
        for old, new in zip(batch, again, strict=True):
            same = old == new if here else all(
                old[key] == new[key] for key in ("outcome", "expected", "prompt_digest"))
            if here and not same:
                raise Refused(f"asked again, it ends as {new['outcome']} with another record",
                              f"item {old['id']}, {old['outcome']}")
            done, elsewhere, differ = done + 1, elsewhere + (not here), differ + (not same)
        progress(done, total)
    if differ > max(1, (1 - ELSEWHERE) * elsewhere):
        raise Refused(f"{differ} of {total} items asked again end otherwise")
    return f"{total - differ} of {total} items asked again end the same" + (
        " (evaluated on another platform)" if elsewhere else "")


def _draw(release: Contents, sample: int) -> list[tuple[Results, list[dict[str, Any]]]]:
    """Whole batches at random, unforeseeable to whoever made the release."""
    batches, drawn = [], list[tuple[Results, list[dict[str, Any]]]]()
    for results, records in release.evaluations:
        left, plan = iter(records), [PlannedItem.from_dict(record) for record in records]
        for planned in split_batches(plan, results.batch_size, results.batch_tokens):
            batch = [next(left) for _ in planned]
            if all(item.task in tasks.TASKS for item in planned):
                batches.append((results, batch))
    random.SystemRandom().shuffle(batches)
    while batches and sum(len(batch) for _, batch in drawn) < sample:
        drawn.append(batches.pop())
    return drawn
