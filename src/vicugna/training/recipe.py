"""Recipes: a model's whole life as YAML, checked before anything runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from vicugna import models
from vicugna.data import SourceSpec
from vicugna.errors import VicugnaError, did_you_mean
from vicugna.files import digest_of, read_text

STAGES = ("tokenizer", "pretrain", "sft", "rl", "eval", "release")


class Strict(BaseModel, extra="forbid", frozen=True):
    """Unknown keys are errors."""


class ModelSpec(Strict):
    """The network. `depth` is the one dial: what is left out follows from it."""
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


class TokenizerSpec(Strict):
    vocab_size: int = Field(2048, ge=300)
    bytes_per_source: int = Field(2_000_000, ge=1)  # text read from each source


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


class StageSpec(Strict):
    """What every training stage has."""
    steps: int = Field(ge=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun
    micro_rows: int | None = Field(None, ge=1)  # rows in one backward pass; None: all of a rank's
    checkpoint_every: int = Field(100, ge=1)
    optimiser: OptimiserSpec = OptimiserSpec()


class TrainSpec(StageSpec):
    """Learning from data: pretraining and supervised fine-tuning."""
    rows: int = Field(16, ge=1)  # sequences in one step, over all ranks
    sequence_length: int = Field(512, ge=8)
    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    validate_every: int = Field(100, ge=1)
    validation_rows: int = Field(16, ge=0)


class RlSpec(StageSpec):
    """Learning from verifiable rewards: GRPO without length or standard-deviation bias."""
    prompts: int = Field(32, ge=1)  # different prompts in one step, over all ranks
    group: int = Field(8, ge=2)  # answers sampled for each
    tasks: tuple[SourceSpec, ...] = Field(min_length=1)
    max_new_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, gt=0)


class EvalSpec(Strict):
    groups: tuple[dict[str, Any], ...] = Field(min_length=1)
    batch: int = Field(64, ge=1)
    compare: tuple[Literal["pretrain", "sft"], ...] = ()  # earlier checkpoints scored as well,
    compare_groups: tuple[str, ...] = ()  # in these groups; all when empty


class ReleaseSpec(Strict):
    name: str = "vicugna"
    purpose: Literal["research", "product"] = "research"
    licence: str = "Apache-2.0"
    summary: str = ""
    limits: tuple[str, ...] = ()


class DataSpec(Strict):
    """The corpus: what the tokenizer learns from first, and what `corpus` means in a stage. A
    recipe that starts from a checkpoint and names `corpus` nowhere needs none."""
    sources: tuple[SourceSpec, ...] = ()


class Recipe(Strict):
    """A whole life. A stage that is null is left out."""
    name: str = "run"
    seed: int = Field(0, ge=0)
    threads: int | None = Field(None, ge=1)
    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    tokenizer: TokenizerSpec = TokenizerSpec()
    pretrain: TrainSpec | None = None
    sft: TrainSpec | None = None
    rl: RlSpec | None = None
    eval: EvalSpec | None = None
    release: ReleaseSpec | None = None

    @model_validator(mode="after")
    def _corpus_expanded(self) -> "Recipe":
        """Put `data.sources`, by their weights, in the place of each stage's source `corpus`."""
        if not self.data.sources:
            self._check_no_corpus()
        total = sum(source.weight for source in self.data.sources)
        for spec in filter(None, (self.pretrain, self.sft)):
            sources: list[SourceSpec] = []
            for source in spec.sources:
                sources += [source] if source.source != "corpus" else [
                    one.model_copy(update={"weight": one.weight * (source.weight / total)})
                    for one in self.data.sources]
            object.__setattr__(spec, "sources", tuple(sources))
        return self

    def _check_no_corpus(self) -> None:
        """Raise ValueError if something needs the corpus, which is missing."""
        for stage in ("pretrain", "sft"):
            spec = getattr(self, stage)
            if spec is not None and any(source.source == "corpus" for source in spec.sources):
                raise ValueError(f"data.sources is missing or empty, but {stage}.sources has "
                                 "`corpus`")
        if self.model.start is None:
            raise ValueError("data.sources is missing or empty, but without model.start the "
                             "tokenizer learns from it")

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved recipe."""
        return digest_of(self.model_dump(mode="json"))


def read(path: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply dotted overrides such as `pretrain.steps=500`. Raises VicugnaError
    naming the key for anything unknown, mistyped or impossible."""
    try:
        values = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise VicugnaError(f"not valid YAML: {error}", str(path), "Correct the file") from error
    if not isinstance(values, dict):
        raise VicugnaError("not a recipe: the file holds no keys", str(path), "See recipes/")
    for setting in settings:
        _override(values, setting)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise VicugnaError(f"unknown key {key!r}", str(path), _nearest(first["loc"])) from None
        said = first["msg"].removeprefix("Value error, ")
        raise VicugnaError(f"{key}: {said}" if key else said, str(path),
                           "Correct the recipe") from None
    try:
        config = recipe.model.config(recipe.tokenizer.vocab_size)
        models.architecture(recipe.model.architecture).Config.from_dict(config)
    except VicugnaError as error:
        raise VicugnaError(error.what, f"{path}, model", error.fix) from error
    return recipe


def _override(values: dict[str, Any], setting: str) -> None:
    """Apply one `a.b.c=value`; the value is YAML."""
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise VicugnaError(f"not of the form key=value: {setting!r}", "--set",
                           "Write for example --set pretrain.steps=500")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise VicugnaError(f"{parent} in {key} has no keys below it", "--set",
                               "Check the key against the recipe")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise VicugnaError(f"the value of {key} is not valid YAML: {text!r}", "--set",
                           "Quote it") from None


def _nearest(location: Sequence[str | int]) -> str:
    """Which keys the place in the recipe has, the nearest to the wrong one first."""
    kind: Any = Recipe
    for part in location[:-1]:
        if part in kind.model_fields:  # and not a number in a list
            kind = kind.model_fields[part].annotation
            kind = next(k for k in (kind, *get_args(kind)) if hasattr(k, "model_fields"))
    return did_you_mean(location[-1], kind.model_fields)
