"""A run: one recipe's life in one folder, stage by stage, going on wherever it was stopped.

    runs/NAME/  recipe.yaml  report.html  NN-STAGE/{stage.json, checkpoint/, state/, metrics.jsonl}
    runs/ledger.sqlite

A stage is done when its stage.json is there, and is not run again while the digest of its inputs
stays the same. What an edited recipe makes obsolete is moved aside, never deleted.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import vicugna
from vicugna import checkpoint, data, evals, files, tasks, tokenizer
from vicugna.data.sources import HUB, STDLIB, TASK, content_digest, paths
from vicugna.distributed import Ranks
from vicugna.errors import VicugnaError
from vicugna.evals.evaluate import evaluate
from vicugna.evals.plan import grid
from vicugna.ledger import Ledger, code_version, recorded
from vicugna.memory import peak_memory
from vicugna.model import Model
from vicugna.release import About, make_release
from vicugna.release.report import write_report
from vicugna.training import rollouts, supervised
from vicugna.training import stage as training
from vicugna.training.recipe import STAGES, Recipe

FORMAT = 1
TRAINED = ("pretrain", "sft", "rl")
Made = tuple[str, dict[str, Any]]  # what a stage made: the digest of its output, and what it cost


@dataclass(frozen=True)
class Run:
    """A recipe being lived in `folder`; `ledger` is its workspace's."""

    recipe: Recipe
    folder: Path
    ledger: Ledger
    ranks: Ranks

    def place(self, stage: str) -> Path:
        """The stage's folder."""
        return self.folder / f"{STAGES.index(stage) + 1:02}-{stage}"

    def done(self, stage: str) -> dict[str, Any] | None:
        """What the finished stage's stage.json says, or None."""
        path = self.place(stage) / "stage.json"
        return files.read_json(path) if path.exists() else None

    @property
    def stages(self) -> list[str]:
        """The recipe's stages, in order."""
        return [s for s in STAGES if s == "tokenizer" or getattr(self.recipe, s) is not None]

    def before(self, stage: str) -> str | None:
        """The last training stage ahead of `stage`, whose weights it starts from."""
        earlier = [s for s in TRAINED if s in self.stages and STAGES.index(s) < STAGES.index(stage)]
        return earlier[-1] if earlier else None


def live(recipe: Recipe, folder: Path, ranks: Ranks, only: str | None = None,
         say: Callable[[str], None] = lambda line: None) -> Run:
    """Live the recipe in `folder`, from where it was stopped; with `only`, just that stage. Raises
    VicugnaError when another process uses the folder or it holds another format, and what a stage
    raises. Interrupted or killed, the same call goes on."""
    _check(recipe)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    run = Run(recipe, folder, Ledger(folder.parent / "ledger.sqlite"), ranks)
    if only is not None and only not in run.stages:
        raise VicugnaError(f"the recipe has no stage {only!r}", "--stage",
                           f"Its stages are {', '.join(run.stages)}")
    with _claimed(run):
        for stage in run.stages[:run.stages.index(only)] if only else ():
            _output(run, stage)  # it must be there
        for stage in [only] if only else run.stages:
            _live_stage(run, stage, say)
            ranks.wait()
        if ranks.first:
            write_report(folder, run.ledger.path)
    return run


def _check(recipe: Recipe) -> None:
    """Raise VicugnaError now for what a later stage would stumble over hours from here."""
    for stage in ("pretrain", "sft"):
        if spec := getattr(recipe, stage):
            _check_sources(spec.sources, f"{stage}.sources")
            if recipe.model.start is None:
                supervised.check_length(spec.sequence_length, recipe.model.context, stage)
    if recipe.data.sources:
        _check_sources(recipe.data.sources, "data.sources")
    if recipe.rl is not None:
        _check_sources(recipe.rl.tasks, "rl.tasks")
        rollouts.check(recipe.rl.tasks, recipe.rl.parallel)
    for group in recipe.eval.groups if recipe.eval else ():
        for one in grid(group):
            tasks.get(one.task)


def _check_sources(specs: Sequence[data.SourceSpec], where: str) -> None:
    for spec in data.parse_specs(specs, where):
        if spec.source != STDLIB and not spec.source.startswith((TASK, HUB)):
            paths(spec)


@contextmanager
def _claimed(run: Run) -> Iterator[None]:
    """The run's folder, for this process group alone, with this recipe in it."""
    if not run.ranks.first:
        run.ranks.wait()
        yield
        return
    with files.owned(run.folder):
        files.sweep_temporaries(run.folder)
        marker = run.folder / "run.json"
        held = files.read_json(marker) if marker.exists() else {"format": FORMAT}
        if held != {"format": FORMAT}:
            raise VicugnaError(f"a run of {held}, not of format {FORMAT}", str(run.folder),
                               "Choose another folder, or the version of vicugna that made it")
        files.write_json(marker, {"format": FORMAT})
        text = yaml.safe_dump(run.recipe.model_dump(mode="json"), sort_keys=False)
        files.write_text(run.folder / "recipe.yaml", text)
        run.ranks.wait()
        yield


def _live_stage(run: Run, stage: str, say: Callable[[str], None]) -> None:
    place = run.place(stage)
    inputs, data_digest, parents = _inputs(run, stage)
    if (done := run.done(stage)) and done["inputs"] == inputs:
        say(f"{stage}: done before")
        return
    run.ranks.wait()
    attempt = ""
    if run.ranks.first:
        _clear(place, inputs, say)
        files.write_json(place / "started.json", {"inputs": inputs})
        if stage != "eval":  # each evaluation has its own
            purpose = run.recipe.release.purpose if run.recipe.release else "research"
            attempt = run.ledger.open(stage, purpose, run.recipe.digest, code_version(),
                                      data_digest, parents, str(run.folder.resolve()))
    run.ranks.wait()
    say(f"{stage}: begins")
    with recorded(run.ledger, attempt, run.folder):
        digest, spent = (WORK[stage](run, place) if stage in TRAINED or run.ranks.first
                         else ("", {}))  # the first rank alone does the rest
        if run.ranks.first:
            if attempt:
                run.ledger.close(attempt, "done", spent, {"digest": digest})
            done = {"stage": stage, "inputs": inputs, "cost": spent, "output": digest}
            files.write_json(place / "stage.json", {**done, "attempt": attempt})


def _clear(place: Path, inputs: str, say: Callable[[str], None]) -> None:
    """Ready the stage's folder: tidy what was killed, move aside what had other inputs."""
    started = place / "started.json"
    if started.exists() and files.read_json(started) != {"inputs": inputs}:
        number = 1
        while (aside := place.with_name(f"{place.name}.old-{number}")).exists():
            number += 1
        place.rename(aside)
        say(f"{place.name}: its inputs changed; the old one is kept as {aside.name}")
    place.mkdir(parents=True, exist_ok=True)
    files.sweep_temporaries(place)


def _inputs(run: Run, stage: str) -> tuple[str, str, list[str]]:
    """(digest of all that decides what the stage makes, digest of its data, its parents')."""
    recipe = run.recipe
    spec = getattr(recipe, stage)
    said = {"stage": stage, "seed": recipe.seed, "spec": spec.model_dump(mode="json")}
    earlier = run.before(stage)
    parents = [] if stage == "tokenizer" else [_output(run, earlier or "tokenizer")]
    data_digest = ""
    if earlier is None and recipe.model.start is not None:
        parents.append(vicugna.load(recipe.model.start).digest)
    if stage == "tokenizer":
        data_digest = files.digest_of([
            [s.model_dump(mode="json"), "" if s.source.startswith(TASK) else content_digest(s)]
            for s in _texts(recipe)] if recipe.model.start is None else [])
    elif stage in ("pretrain", "sft"):
        data_digest = data.open_stream(spec.sources, _tokenizer(run), spec.sequence_length,
                                       recipe.seed, run.folder / "tokens").digest
        said["model"] = recipe.model.model_dump(mode="json")
    elif stage == "eval":
        parents = [_output(run, s) for s in _evaluated(run)]
    elif stage == "release":
        parents += [_output(run, "eval")]
    return files.digest_of({**said, "data": data_digest, "parents": parents}), data_digest, parents


def _output(run: Run, stage: str) -> str:
    """The digest of what a stage made; VicugnaError if it is not done."""
    done = run.done(stage)
    if done is None:
        raise VicugnaError(f"stage {stage} is not done", str(run.folder),
                           f"Run it first: --stage {stage}")
    return str(done["output"])


def _tokenizer(run: Run) -> tokenizer.Tokenizer:
    return tokenizer.Tokenizer(run.place("tokenizer") / "checkpoint")


def _texts(recipe: Recipe) -> list[data.SourceSpec]:
    """What the tokenizer learns from: the corpus, and the files and tasks of later stages."""
    later = [s for spec in (recipe.pretrain, recipe.sft) if spec is not None for s in spec.sources]
    chosen = {s.source: s for s in [*later, *recipe.data.sources]}
    return [s.model_copy(update={"weight": 1.0}) for s in chosen.values()]


def _make_tokenizer(run: Run, place: Path) -> Made:
    spec, start = run.recipe.tokenizer, run.recipe.model.start
    if start is not None:
        made = checkpoint.read(start).tokenizer
        if made is None:
            raise VicugnaError("the checkpoint has no tokenizer", start, "Add its tokenizer files")
    else:
        sources = _texts(run.recipe)
        made = tokenizer.train(data.texts(sources, spec.bytes_per_source * len(sources)),
                               spec.vocab_size)
    with files.replacing_folder(place / "checkpoint") as folder:
        made.save(folder)
    return made.digest, {"peak_memory_bytes": peak_memory()}


def _load(run: Run, stage: str) -> Model:
    """The checkpoint that a finished stage made; VicugnaError if it was changed since."""
    folder = run.place(stage) / "checkpoint"
    model = vicugna.load(folder, device=str(run.ranks.device))
    if model.digest != _output(run, stage):
        raise VicugnaError("the checkpoint is not the one this stage made", str(folder),
                           "Restore it, or delete the stage's folder to make it again")
    return model


def _train(run: Run, place: Path) -> Made:
    stage, recipe = place.name.split("-", 1)[1], run.recipe
    earlier = run.before(stage)
    model = (_load(run, earlier) if earlier is not None else
             training.start(recipe.model, _tokenizer(run), recipe.seed, run.ranks))
    return training.train_stage(model, getattr(recipe, stage), recipe.seed, place,
                                run.folder / "tokens", stage, run.ranks)


def _evaluated(run: Run) -> list[str]:
    """The stages whose models are evaluated, the final one last."""
    final = run.before("eval")
    if final is None:
        raise VicugnaError("nothing to evaluate: the recipe trains no model", "eval",
                           "Add a pretrain or sft stage")
    assert run.recipe.eval is not None
    return [s for s in run.recipe.eval.compare if s in run.stages and s != final] + [final]


def _evaluate(run: Run, place: Path) -> Made:
    spec = run.recipe.eval
    assert spec is not None
    digests = []
    for stage in _evaluated(run):
        model = _load(run, stage)
        assert model.tokenizer is not None
        compared = stage != run.before("eval") and spec.compare_groups
        plan = evals.build_plan([group for group in spec.groups if not compared
                                 or group.get("group") in spec.compare_groups], model.tokenizer)
        digests.append(evaluate(model, plan, spec.batch, place / stage, run.ledger,
                                run.recipe.digest, str(run.folder.resolve())).digest)
    made = [one.cost for one in run.ledger.attempts() if one.result.get("digest") in digests]
    spent = {k: sum(c.get(k, 0) for c in made) for k in ("tokens", "flops", "device_seconds")}
    return files.digest_of(digests), {**spent, "peak_memory_bytes": peak_memory()}


def _release(run: Run, place: Path) -> Made:
    spec, final = run.recipe.release, run.before("release")
    assert spec is not None and final is not None
    about = About(spec.name, spec.summary, list(spec.limits), spec.licence)
    manifest = make_release(run.place(final) / "checkpoint", [run.place("eval") / final],
                            run.ledger, run.folder / "recipe.yaml", place / "release", about)
    return manifest["release_digest"], {"peak_memory_bytes": peak_memory()}


WORK: dict[str, Callable[[Run, Path], Made]] = {
    "tokenizer": _make_tokenizer, "pretrain": _train, "sft": _train, "rl": _train,
    "eval": _evaluate, "release": _release}
