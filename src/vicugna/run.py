"""A run: the stages of one recipe in one folder, resumed wherever it was stopped.

    runs/NAME/  recipe.yaml  report.html  NN-STAGE/{stage.json, checkpoint/, state/, metrics.jsonl}
    runs/ledger.sqlite

A stage is done when its stage.json is there, and is not run again while the digest of its inputs
stays the same, whatever has become of its number or name. What an edited recipe makes obsolete is
moved aside, never deleted.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

import vicugna
from vicugna import data, evals, files, tasks
from vicugna.data.sources import HUB, TASK, content_digest, paths
from vicugna.distributed import Ranks
from vicugna.errors import VicugnaError
from vicugna.evals.evaluate import evaluate
from vicugna.evals.plan import grid
from vicugna.ledger import Ledger, code_version, recorded
from vicugna.memory import peak_memory
from vicugna.model import Model
from vicugna.release import About, make_release
from vicugna.release.report import write_report
from vicugna.tokenizer import Tokenizer
from vicugna.tokenizer import train as train_tokenizer
from vicugna.training import rollouts, supervised
from vicugna.training import stage as training
from vicugna.training.recipe import (
    START,
    AnyStage,
    EvalSpec,
    Recipe,
    ReleaseSpec,
    RlSpec,
    StageSpec,
    TokenizerSpec,
    TrainSpec,
)

FORMAT = 2
Result = tuple[str, dict[str, Any]]  # the digest of what a stage made, and what it cost
Log = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """A recipe and the folder in which it is run; `ledger` is its workspace's. `loaded` holds the
    model that was loaded last, by the name of its stage and device."""

    recipe: Recipe
    folder: Path
    ledger: Ledger
    ranks: Ranks
    loaded: dict[tuple[str, str], Model] = field(default_factory=dict)

    @cached_property
    def start_digest(self) -> str:
        """The digest of the checkpoint START, taken before it is trained."""
        return self.model(START, "meta").digest

    def path(self, name: str) -> Path:
        """The folder of the stage."""
        return self.folder / f"{len(self.recipe.before(name)) + 1:02}-{name}"

    def record(self, name: str) -> dict[str, Any] | None:
        """What the stage's stage.json says; None while the stage is not done."""
        path = self.path(name) / "stage.json"
        return files.read_json(path) if path.exists() else None

    def output(self, name: str) -> str:
        """The digest of what a stage made, or of the checkpoint START; VicugnaError if the stage
        is not done."""
        if name == START:
            return self.start_digest
        record = self.record(name)
        if record is None:
            raise VicugnaError(f"stage {name} is not done", str(self.folder),
                               f"Run it first: --stage {name}")
        return str(record["output"])

    def model(self, name: str, device: str | None = None) -> Model:
        """The model that a stage made, or the checkpoint START, on this rank's device or on
        "meta", without weights; VicugnaError if it was changed since."""
        key = name, device or str(self.ranks.device)
        if key not in self.loaded:
            self.loaded.clear()
            folder = self.path(name) / "checkpoint" if name != START else self.recipe.model.start
            self.loaded[key] = vicugna.load(str(folder), device=key[1])
            if name != START and self.loaded[key].digest != self.output(name):
                raise VicugnaError("the checkpoint is not the one this stage made", str(folder),
                                   "Restore it, or delete the stage's folder to make it again")
        return self.loaded[key]

    def tokenizer(self, name: str) -> Tokenizer:
        """The tokenizer of the model that training stage `name` starts from."""
        before = self.recipe.model_before(name)
        if before == START:
            return self.model(START, "meta").text_tokenizer()
        made = before or next(one.name for one in self.recipe.before(name)
                              if isinstance(one, TokenizerSpec))
        self.output(made)  # it must be done
        return Tokenizer(self.path(made) / "checkpoint")


def run_recipe(recipe: Recipe, folder: Path, ranks: Ranks, only: str | None = None,
               log: Log = lambda line: None) -> Run:
    """Run the recipe in `folder`, from where it was stopped; with `only`, just the stage of that
    name. Raises VicugnaError when another process uses the folder or it holds another format, and
    what a stage raises. Interrupted or killed, the same call resumes it."""
    _check(recipe)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    run = Run(recipe, folder, Ledger(folder.parent / "ledger.sqlite"), ranks)
    stages = recipe.stages if only is None else (recipe.stage(only),)
    with files.owned(folder) if ranks.first else nullcontext():
        if ranks.first:
            _open_folder(run)
        ranks.wait()
        for stage in stages:
            _run_stage(run, stage, log)
            ranks.wait()
        if ranks.first:
            write_report(folder, run.ledger.path)
    return run


def _check(recipe: Recipe) -> None:
    """Raise VicugnaError now for what would fail in a later stage, perhaps after hours."""
    for stage in recipe.stages:
        where = f"stages.{stage.name}"
        match stage:
            case TokenizerSpec() | TrainSpec():
                for spec in data.parse_specs(stage.sources, f"{where}.sources"):
                    if not spec.source.startswith((TASK, HUB)):
                        paths(spec)
            case RlSpec():
                data.parse_specs(stage.tasks, f"{where}.tasks")
                rollouts.check(stage.tasks, stage.parallel, where)
            case EvalSpec():
                for one in [one for group in stage.groups for one in grid(group)]:
                    tasks.get(one.task)
        if isinstance(stage, TrainSpec) and recipe.model.start is None:
            supervised.check_length(stage.sequence_length, recipe.model.context, where)


def _open_folder(run: Run) -> None:
    """Store the recipe in the run's folder, and number the stages' folders as in this recipe."""
    files.sweep_temporaries(run.folder)
    marker = run.folder / "run.json"
    held = files.read_json(marker) if marker.exists() else {"format": FORMAT}
    if held != {"format": FORMAT}:
        raise VicugnaError(f"a run of {held}, not of format {FORMAT}", str(run.folder),
                           "Choose another folder, or the version of vicugna that made it")
    files.write_json(marker, {"format": FORMAT})
    numbered = {name: path for path in run.folder.iterdir()
                for number, _, name in [path.name.partition("-")] if number.isdigit()}
    for stage in run.recipe.stages:
        if stage.name in numbered and not run.path(stage.name).exists():
            numbered[stage.name].rename(run.path(stage.name))
    text = yaml.safe_dump(run.recipe.model_dump(mode="json"), sort_keys=False)
    files.write_text(run.folder / "recipe.yaml", text)


def _run_stage(run: Run, stage: AnyStage, log: Log) -> None:
    path = run.path(stage.name)
    inputs, data_digest, parents = _inputs(run, stage)
    if run.ranks.first:
        _prepare(run, path, inputs, log)
    run.ranks.wait()
    if run.record(stage.name):
        log(f"{stage.name}: up to date")
        return
    attempt = ""
    if run.ranks.first and not isinstance(stage, EvalSpec):  # each evaluation has its own
        attempt = run.ledger.open(
            stage.kind, run.recipe.purpose(stage.name), run.recipe.digest, code_version(),
            data_digest, parents, run.folder.resolve().name)
    log(f"{stage.name}: starting")
    with recorded(run.ledger, attempt, run.folder):
        digest, cost = (WORK[stage.kind](run, stage, path)
                        if isinstance(stage, StageSpec | EvalSpec) or run.ranks.first
                        else ("", {}))  # the first rank alone does the rest
        if run.ranks.first:
            if attempt:
                run.ledger.close(attempt, "done", cost, {"digest": digest})
            files.write_json(path / "stage.json", {
                "kind": stage.kind, "inputs": inputs, "cost": cost, "output": digest,
                "attempt": attempt})


def _prepare(run: Run, path: Path, inputs: str, log: Log) -> None:
    """Leave in the stage's folder only what was made from these inputs, finished or not. What was
    made from others is moved aside; what was once moved aside, or was made under a name that the
    recipe no longer has, comes back."""
    if path.exists() and _started(path) not in (inputs, None):
        number = 1
        while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
            number += 1
        path.rename(aside)
        log(f"{path.name}: its inputs changed; the earlier one is now {aside.name}")
    if not path.exists():
        current = {run.path(stage.name) for stage in run.recipe.stages}
        for other in sorted({*run.folder.iterdir()} - current):
            if _started(other) == inputs:
                log(f"{path.name}: found as {other.name}")
                other.rename(path)
                break
    path.mkdir(parents=True, exist_ok=True)
    files.sweep_temporaries(path)
    if _started(path) is None:
        files.write_json(path / "started.json", {"inputs": inputs})


def _started(path: Path) -> str | None:
    """The digest of the inputs that a stage's folder was begun with."""
    started = path / "started.json"
    return files.read_json(started)["inputs"] if started.exists() else None


def _inputs(run: Run, stage: AnyStage) -> tuple[str, str, list[str]]:
    """(digest of all that decides what the stage makes, digest of its data, its parents')."""
    recipe, data_digest, parents = run.recipe, "", list[str]()
    inputs: dict[str, Any] = {"spec": stage.model_dump(mode="json", exclude={"name"})}
    before = recipe.model_before(stage.name)
    match stage:
        case TokenizerSpec():
            data_digest = files.digest_of([
                [s.model_dump(mode="json"), "" if s.source.startswith(TASK) else content_digest(s)]
                for s in stage.sources])
        case EvalSpec():
            inputs["date"] = recipe.date.isoformat()
            parents = [run.output(name) for name in recipe.scored(stage)]
        case ReleaseSpec():
            parents = [run.output(name) for name in (before, *recipe.evidence(stage.name)) if name]
        case _:
            inputs |= {"date": recipe.date.isoformat(), "seed": _seed(run, stage)}
            parents = [run.output(before) if before else run.tokenizer(stage.name).digest]
            if before is None:
                inputs["model"] = recipe.model.model_dump(mode="json")
    if isinstance(stage, TrainSpec):
        data_digest = data.open_stream(stage.sources, run.tokenizer(stage.name),
                                       stage.sequence_length, _seed(run, stage),
                                       run.folder / "tokens", date=recipe.date).digest
    return (files.digest_of({**inputs, "data": data_digest, "parents": parents}), data_digest,
            parents)


def _seed(run: Run, stage: StageSpec) -> int:
    """The recipe's seed for the first training stage of a kind, another for each further one."""
    earlier = [one for one in run.recipe.before(stage.name) if one.kind == stage.kind]
    return run.recipe.seed if not earlier else int(
        files.digest_of([run.recipe.seed, len(earlier)])[:12], 16)


def _make_tokenizer(run: Run, stage: TokenizerSpec, path: Path) -> Result:
    texts = data.texts(stage.sources, stage.bytes_per_source * len(stage.sources))
    made = train_tokenizer(texts, stage.vocab_size)
    with files.replacing_folder(path / "checkpoint") as folder:
        made.save(folder)
    return made.digest, peak_memory()


def _train(run: Run, stage: TrainSpec | RlSpec, path: Path) -> Result:
    before, seed = run.recipe.model_before(stage.name), _seed(run, stage)
    if before is None:
        model = training.new_model(run.recipe.model, run.tokenizer(stage.name))
    else:
        model = run.model(before, "meta")
        run.loaded.clear()  # training changes it
    return training.train_stage(model, stage, seed, path, run.folder / "tokens", stage.name,
                                run.ranks, run.recipe.date)


def _evaluate(run: Run, stage: EvalSpec, path: Path) -> Result:
    digests, names = [], run.recipe.scored(stage)
    for name in names:
        model = run.model(name)
        fewer = stage.compare_groups if name != names[-1] else ()
        groups = [group for group in stage.groups if not fewer or group["group"] in fewer]
        plan = evals.build_plan(groups, model.text_tokenizer(), run.recipe.date)
        digests.append(evaluate(model, plan, stage.batch, path / name, run.ledger,
                                run.recipe.digest, run.folder.resolve().name,
                                purpose=run.recipe.purpose(stage.name),
                                ranks=run.ranks).digest)
    costs = {attempt.result.get("digest"): attempt.cost for attempt in run.ledger.attempts()}
    cost = {key: sum(costs[digest].get(key, 0) for digest in digests)
            for key in ("tokens", "flops", "device_seconds")}
    return files.digest_of(digests), {**cost, **peak_memory()}


def _release(run: Run, stage: ReleaseSpec, path: Path) -> Result:
    final = run.recipe.model_before(stage.name)
    assert final is not None
    about = About(stage.title, stage.summary, list(stage.limits), stage.licence)
    results = [run.path(name) / final for name in run.recipe.evidence(stage.name)]
    manifest = make_release(run.path(final) / "checkpoint", results, run.ledger,
                            run.folder / "recipe.yaml", path / "release", about)
    return manifest["release_digest"], peak_memory()


WORK: dict[str, Callable[..., Result]] = {
    "tokenizer": _make_tokenizer, "pretrain": _train, "sft": _train, "rl": _train,
    "eval": _evaluate, "release": _release}
