"""Recipes: the stages a model goes through, as YAML that is checked before anything runs."""

import datetime
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from vicugna import models
from vicugna.data import SourceSpec
from vicugna.errors import VicugnaError, did_you_mean
from vicugna.files import RECIPES, digest_of, read_text
from vicugna.training import earlier_recipe

DATE = datetime.date(2026, 1, 1)  # the default, so that nothing depends on the day of a run
START = "start"  # the name of the checkpoint model.start among those that stages make
CORPUS = "corpus"  # the source that stands for data.sources


class Strict(BaseModel, extra="forbid", frozen=True):
    """Unknown keys are errors."""


class ModelSpec(Strict):
    """The network. What is left out follows from `depth`."""
    architecture: Literal["vicugna", "llama"] = "vicugna"
    depth: int = Field(4, ge=1)
    width: int | None = Field(None, ge=2)  # 64 * depth
    heads: int | None = Field(None, ge=1)  # width / 64
    kv_heads: int | None = Field(None, ge=1)  # heads
    feed_forward: int | None = Field(None, ge=1)  # 8/3 * width, to a multiple of 64
    context: int = Field(8192, ge=16)
    window: int = Field(64, ge=1)  # vicugna: the sliding layers' reach
    experts: int = Field(0, ge=0)  # vicugna: 0 is dense
    experts_per_token: int = Field(2, ge=1)
    tied: bool = True
    start: str | None = None  # a checkpoint to start from, instead of random weights

    def config(self, vocab_size: int) -> dict[str, Any]:
        """The config.json of this network."""
        width = self.width or 64 * self.depth
        heads = self.heads or max(1, width // 64)
        if width % heads:
            raise VicugnaError(f"width {width} is not divisible by heads {heads}", "model",
                               "Choose a width that is a multiple of the heads")
        own = {"sliding_window": self.window, "num_experts": self.experts,
               "num_experts_per_tok": self.experts_per_token}
        return {
            "model_type": self.architecture, "vocab_size": vocab_size, "hidden_size": width,
            "intermediate_size": self.feed_forward or (8 * width // 3 + 63) // 64 * 64,
            "num_hidden_layers": self.depth, "num_attention_heads": heads,
            "num_key_value_heads": self.kv_heads or heads, "head_dim": width // heads,
            "max_position_embeddings": self.context, "tie_word_embeddings": self.tied,
            **(own if self.architecture == "vicugna" else {})}


class Stage(Strict):
    """What every stage has: what it does, and a name that no other stage of the recipe has."""
    kind: str
    name: str = Field(default_factory=lambda stage: str(stage["kind"]),
                      pattern="^[A-Za-z][A-Za-z0-9_-]*$")


class TokenizerSpec(Stage):
    """Training the tokenizer of a new network."""
    kind: Literal["tokenizer"] = "tokenizer"
    vocab_size: int = Field(2048, ge=300)
    sources: tuple[SourceSpec, ...] = Field((SourceSpec(source=CORPUS),), min_length=1)
    bytes_per_source: int = Field(2_000_000, ge=1)  # of text, on average


class OptimiserSpec(Strict):
    kind: Literal["muon", "adamw"] = "muon"
    learning_rate: float = Field(0.004, gt=0)  # AdamW's
    muon_learning_rate: float = Field(0.02, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    clip: float = Field(1.0, gt=0)  # largest gradient norm
    schedule: Literal["wsd", "cosine"] = "wsd"
    warmup: int = Field(20, ge=0)  # steps
    decay: float = Field(0.4, gt=0, le=1)  # wsd: share of the steps in which the rate falls
    final: float = Field(0.0, ge=0, le=1)  # share of the rate left at the end


class StageSpec(Stage):
    """What every stage that trains the network has."""
    steps: int = Field(ge=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun
    micro_rows: int | None = Field(None, ge=1)  # rows in one backward pass; None: all of a rank's
    checkpoint_every: int = Field(100, ge=1)
    optimiser: OptimiserSpec = OptimiserSpec()


class TrainSpec(StageSpec):
    """Learning from data: pretraining and supervised fine-tuning."""
    kind: Literal["pretrain", "sft"] = "pretrain"
    rows: int = Field(16, ge=1)  # sequences in one step, over all ranks
    sequence_length: int = Field(512, ge=8)
    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    validate_every: int = Field(100, ge=1)
    validation_rows: int = Field(16, ge=0)


class RlSpec(StageSpec):
    """Learning from verifiable rewards: GRPO without length or standard-deviation bias."""
    kind: Literal["rl"] = "rl"
    prompts: int = Field(32, ge=1)  # different prompts in one step, over all ranks
    group: int = Field(8, ge=2)  # answers sampled for each
    tasks: tuple[SourceSpec, ...] = Field(min_length=1)
    max_new_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, gt=0)


class EvalSpec(Stage):
    """Scoring the model so far, and the models of earlier stages beside it."""
    kind: Literal["eval"] = "eval"
    groups: tuple[dict[str, Any], ...] = Field(min_length=1)
    batch: int = Field(64, ge=1)
    compare: tuple[str, ...] = ()  # training stages, or `start`, whose models are scored as well,
    compare_groups: tuple[str, ...] = ()  # in these groups; all when empty


class ReleaseSpec(Stage):
    """A release of the model so far, with its evaluations."""
    kind: Literal["release"] = "release"
    title: str = "vicugna"
    purpose: Literal["research", "product"] = "research"
    licence: str = "Apache-2.0"
    summary: str = ""
    limits: tuple[str, ...] = ()


AnyStage = TokenizerSpec | TrainSpec | RlSpec | EvalSpec | ReleaseSpec
KINDS: dict[str, type[Stage]] = {kind: spec for spec in get_args(AnyStage)
                                 for kind in get_args(spec.model_fields["kind"].annotation)}


class DataSpec(Strict):
    """The corpus: what the source `corpus` of a stage stands for."""
    sources: tuple[SourceSpec, ...] = ()


class Recipe(Strict):
    """A model's stages, in order, and what they share."""
    name: str = Field("run", pattern=r"^\w[^/\\]*$")  # of the run's folder, in runs/
    seed: int = Field(0, ge=0)
    date: datetime.date = DATE  # today, to chat templates that ask for it
    threads: int | None = Field(None, ge=1)
    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    stages: tuple[Annotated[AnyStage, Field(discriminator="kind")], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _checked(self) -> "Recipe":
        for number, stage in enumerate(self.stages):
            if stage.name in [START, *(earlier.name for earlier in self.stages[:number])]:
                raise VicugnaError(f"the name {stage.name!r} is taken", f"stages.{number}",
                                   "Give each stage a name of its own with the key name")
        for stage in self.stages:
            if isinstance(stage, TokenizerSpec | TrainSpec):
                self._expand_corpus(stage)
            _check_order(self, stage)
        return self

    def _expand_corpus(self, stage: TokenizerSpec | TrainSpec) -> None:
        """Put `data.sources`, by their weights, in the place of the stage's source `corpus`."""
        sources, total = list[SourceSpec](), sum(one.weight for one in self.data.sources)
        for source in stage.sources:
            if source.source == CORPUS and not total:
                raise VicugnaError("data.sources is missing or empty, but this stage learns from "
                                   "`corpus`", f"stages.{stage.name}.sources", "Add data.sources")
            sources += [source] if source.source != CORPUS else [
                one.model_copy(update={"weight": one.weight * (source.weight / total)})
                for one in self.data.sources]
        object.__setattr__(stage, "sources", tuple(sources))

    def stage(self, name: str) -> AnyStage:
        """The stage of this name; VicugnaError if there is none."""
        stages = {stage.name: stage for stage in self.stages}
        if name not in stages:
            raise VicugnaError(f"the recipe has no stage {name!r}", "stages",
                               did_you_mean(name, stages))
        return stages[name]

    def before(self, name: str) -> list[AnyStage]:
        """The stages ahead of stage `name`."""
        return list(self.stages[:self.stages.index(self.stage(name))])

    def model_before(self, name: str) -> str | None:
        """The training stage whose model stage `name` trains, scores or releases: the last one
        ahead of it, or else START, the checkpoint model.start; None where there is no model yet."""
        trained = [stage.name for stage in self.before(name) if isinstance(stage, StageSpec)]
        return trained[-1] if trained else START if self.model.start is not None else None

    def scored(self, stage: EvalSpec) -> list[str]:
        """The training stages, or START, whose models an eval stage scores; the model so far
        comes last."""
        final = self.model_before(stage.name)
        assert final is not None  # as _check_order saw to
        return [*(name for name in dict.fromkeys(stage.compare) if name != final), final]

    def evidence(self, name: str) -> list[str]:
        """The eval stages ahead of release stage `name` that score the model it releases."""
        final = self.model_before(name)
        return [stage.name for stage in self.before(name)
                if isinstance(stage, EvalSpec) and final in self.scored(stage)]

    def purpose(self, name: str) -> str:
        """What stage `name` is done for: "product" if a release from it on is one."""
        return "product" if any(isinstance(stage, ReleaseSpec) and stage.purpose == "product"
                                for stage in self.stages[len(self.before(name)):]) else "research"

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of the new network; VicugnaError if its shape is impossible."""
        sizes = [stage.vocab_size for stage in self.stages if isinstance(stage, TokenizerSpec)]
        config = self.model.config(*sizes[:1] or [2048])
        models.architecture(self.model.architecture).Config.from_dict(config)
        return config

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved recipe."""
        return digest_of(self.model_dump(mode="json"))


def with_release(recipe: Recipe) -> tuple[Recipe, str]:
    """The recipe, and the name of a stage in it that releases its last model; one is added at the
    end unless it is there."""
    last = next((stage for stage in reversed(recipe.stages)
                 if isinstance(stage, StageSpec | ReleaseSpec)), None)
    if isinstance(last, ReleaseSpec):
        return recipe, last.name
    taken = {stage.name for stage in recipe.stages}
    name = next(name for n in count() if (name := f"release{n or ''}") not in taken)
    release = {"kind": "release", "name": name, "title": recipe.name}
    values = recipe.model_dump()
    return Recipe.model_validate({**values, "stages": [*values["stages"], release]}), name


def _check_order(recipe: Recipe, stage: AnyStage) -> None:
    """Raise VicugnaError when the stages ahead of a stage do not give what it needs."""
    model, earlier = recipe.model_before(stage.name), recipe.before(stage.name)
    tokenizer = any(isinstance(one, TokenizerSpec) for one in earlier)
    known = [START] * (recipe.model.start is not None) + [
        one.name for one in earlier if isinstance(one, StageSpec)]
    match stage:
        case TokenizerSpec() if model or tokenizer:
            what = "a model has one tokenizer, and here it has one already"
            fix = ("Leave this stage out, or put it before the first stage that trains"
                   if model != START else "Leave this stage out "
                   f"(--set stages.{stage.name}=null): the tokenizer is that of model.start")
        case StageSpec() if not model and not tokenizer:
            what = "a new network needs a tokenizer"
            fix = "Put {kind: tokenizer} first, or set model.start to a checkpoint"
        case EvalSpec() | ReleaseSpec() if model is None:
            what, fix = "there is no model yet", "Put it after a stage that trains one"
        case EvalSpec() if unknown := sorted({*stage.compare} - {*known}):
            what = f"compare: no training stage {unknown[0]!r} comes before it"
            fix = did_you_mean(unknown[0], known)
        case EvalSpec() if unknown := sorted({*stage.compare_groups} - {
                *(groups := [str(one.get("group")) for one in stage.groups])}):
            what = f"compare_groups: no group {unknown[0]!r}"
            fix = did_you_mean(unknown[0], groups)
        case ReleaseSpec() if model == START:
            what, fix = "no stage before it trains a model", "Put it after one that does"
        case ReleaseSpec() if not recipe.evidence(stage.name):
            what = f"nothing scores the model of stage {model!r} before it is released"
            fix = f"Put an eval stage between {model} and {stage.name}"
        case _:
            return
    raise VicugnaError(what, f"stages.{stage.name}", fix)


def find(recipe: str | Path) -> Path:
    """The file of a recipe that is given by its path, or by the name of one that comes with this
    package. VicugnaError if there is none."""
    path = Path(recipe).expanduser()
    known = {one.stem: one for folder in RECIPES[::-1] for one in sorted(folder.glob("*.yaml"))}
    if path.exists() and not path.is_dir():
        return path
    if str(recipe) not in known:
        raise VicugnaError("no such file, and no recipe of this name", str(recipe),
                           did_you_mean(path.stem, known))
    return known[str(recipe)]


def read(recipe: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe (see `find`) and apply dotted overrides: `model.depth=8`, and for the stage
    called sft `stages.sft.steps=500`. Raises VicugnaError naming the key for anything unknown,
    mistyped or impossible."""
    path = find(recipe)
    try:
        values = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise VicugnaError(f"not valid YAML: {' '.join(str(error).split())}", str(path),
                           "Correct the file") from error
    if not isinstance(values, dict):
        raise VicugnaError("not a recipe: the file holds no keys", str(path), "See recipes/")
    earlier_recipe.refuse(values, str(path))
    for setting in settings:
        _override(values, setting)
    try:
        made = Recipe.model_validate(values)
    except ValidationError as error:
        raise _refusal(error, values, str(path)) from None
    try:
        made.config  # noqa: B018 - it checks the network's shape
    except VicugnaError as error:
        raise VicugnaError(error.what, f"{path}, model", error.fix) from error
    return made


def _override(values: dict[str, Any], setting: str) -> None:
    """Apply one `a.b.c=value`; the value is YAML, and null takes a stage out."""
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise VicugnaError(f"not of the form key=value: {setting!r}", "--set",
                           "Write for example --set stages.pretrain.steps=500")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise VicugnaError(f"the value of {key} is not valid YAML: {text!r}", "--set",
                           "Quote it") from None
    *parents, last = key.split(".")
    if parents and parents[0] in _names(values.get("stages")) and parents[0] not in values:
        raise VicugnaError(f"unknown key {key!r}", "--set", f"Did you mean 'stages.{key}'?")
    target: Any = values
    for part in parents:
        target = (target[_number(target, part, key)] if isinstance(target, list) else
                  target.setdefault(part, {}))
        if not isinstance(target, dict | list):
            raise VicugnaError(f"{part} in {key} has no keys below it", "--set",
                               "Check the key against the recipe")
    if isinstance(target, dict):
        target[last] = value
    else:
        number = _number(target, last, key)
        target[number:number + 1] = [] if value is None else [value]


def _names(stages: Any) -> list[str]:
    """The names of stages as they stand in the file; "" for what has none."""
    return [str(one.get("name") or one.get("kind") or "") if isinstance(one, dict) else ""
            for one in (stages if isinstance(stages, list) else ())]


def _number(stages: list[Any], name: str, key: str) -> int:
    if name not in (names := _names(stages)):
        if not any(names):
            raise VicugnaError(f"{key} is part of a list", "--set", "Set the whole list")
        raise VicugnaError(f"no stage is called {name!r}", f"--set {key}",
                           did_you_mean(name, names))
    return names.index(name)


def _refusal(error: ValidationError, values: dict[str, Any], path: str) -> VicugnaError:
    """The first thing that pydantic found wrong, with the stage's name in place of its number."""
    first = error.errors()[0]
    location: list[Any] = list(first["loc"])
    spec: Any = Recipe
    kind, within = first["type"], location[:-1]  # the keys from spec to it
    if location[0] == "stages" and location[2:]:
        _, number, tag, *within, _ = location
        spec, location[1:3] = KINDS[tag], [values["stages"][number].get("name") or tag]
    key = ".".join(map(str, location))
    if kind == "union_tag_invalid":
        tag = first["ctx"]["tag"]
        return VicugnaError(f"{key}: unknown kind {tag!r}", path, did_you_mean(tag, KINDS))
    if kind == "union_tag_not_found":
        return VicugnaError(f"{key}: a stage without its kind", path,
                            f"Give the key kind: one of {', '.join(KINDS)}")
    if kind == "extra_forbidden":
        for part in within:
            if part in spec.model_fields:  # and not a number in a list
                spec = spec.model_fields[part].annotation
                spec = next(k for k in (spec, *get_args(spec)) if hasattr(k, "model_fields"))
        return VicugnaError(f"unknown key {key!r}", path,
                            did_you_mean(location[-1], spec.model_fields))
    message = first["msg"].replace("tuple", "list").replace("Tuple", "List")
    return VicugnaError(f"{key}: {message}", path, "Correct the recipe")
