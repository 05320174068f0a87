"""Recipes: found by path or name, checked before anything runs, overridden by dotted keys."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from vicugna.errors import VicugnaError
from vicugna.training import recipe
from vicugna.training.recipe import EvalSpec, Recipe, read, with_release

ITEMS = {"group": "g", "task": "reasoning.steps", "n": 3}
TOKENIZER = {"kind": "tokenizer"}
PRETRAIN = {"kind": "pretrain", "steps": 1, "sources": ["stdlib"]}
SFT = {"kind": "sft", "steps": 1, "sources": ["stdlib"]}
RL = {"kind": "rl", "steps": 1, "tasks": ["task:reasoning.steps"]}
EVAL = {"kind": "eval", "groups": [ITEMS]}
RELEASE = {"kind": "release"}


def of(*stages: dict[str, Any], **more: Any) -> Recipe:
    return Recipe.model_validate({"data": {"sources": ["stdlib"]}, "stages": stages, **more})


def named(name: str, stage: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**stage, "name": name, **more}


def test_stages_of_any_kind_in_any_order_and_number() -> None:
    made = of(TOKENIZER, SFT, named("first", EVAL), named("early", RELEASE, purpose="product"), RL,
              named("more", SFT), named("last", EVAL, compare=["sft", "rl", "more"]), PRETRAIN,
              named("again", EVAL), named("late", RELEASE))
    models = {stage.name: made.model_before(stage.name) for stage in made.stages}
    assert models == {"tokenizer": None, "sft": None, "first": "sft", "early": "sft", "rl": "sft",
                      "more": "rl", "last": "more", "pretrain": "more", "again": "pretrain",
                      "late": "pretrain"}
    scored = {stage.name: made.scored(stage) for stage in made.stages
              if isinstance(stage, EvalSpec)}
    assert scored == {"first": ["sft"], "last": ["sft", "rl", "more"], "again": ["pretrain"]}
    assert made.evidence("early") == ["first"] and made.evidence("late") == ["again"]
    assert {stage.name for stage in made.stages if made.purpose(stage.name) == "product"} == {
        "tokenizer", "sft", "first", "early"}


def test_a_checkpoint_to_start_from() -> None:
    made = of(named("before", EVAL), SFT, named("after", EVAL, compare=["start"]), RELEASE,
              model={"start": "org/name"}, data={})
    assert made.model_before("before") == "start" == made.model_before("sft")
    after = made.stage("after")
    assert isinstance(after, EvalSpec) and made.scored(after) == ["start", "sft"]
    assert made.evidence("release") == ["after"]


@pytest.mark.parametrize(("stages", "said"), [
    ([TOKENIZER, SFT, SFT], "stages.2: the name 'sft' is taken"),
    ([TOKENIZER, named("start", SFT)], "stages.1: the name 'start' is taken"),
    ([SFT], "stages.sft: a new network needs a tokenizer"),
    ([SFT, TOKENIZER], "stages.sft: a new network needs a tokenizer"),
    ([TOKENIZER, SFT, named("t", TOKENIZER)], "stages.t: a model has one tokenizer"),
    ([TOKENIZER, named("t", TOKENIZER), SFT], "stages.t: a model has one tokenizer"),
    ([TOKENIZER, EVAL, SFT], "stages.eval: there is no model yet"),
    ([TOKENIZER, RELEASE], "stages.release: there is no model yet"),
    ([TOKENIZER, SFT, RELEASE], "nothing scores the model of stage 'sft' before it is released"),
    ([TOKENIZER, SFT, EVAL, RL, RELEASE], "nothing scores the model of stage 'rl'"),
    ([TOKENIZER, SFT, named("e", EVAL, compare=["rl"]), RL], "no training stage 'rl' comes before"),
    ([TOKENIZER, PRETRAIN, SFT, named("e", EVAL, compare=["pretrian"])], "mean 'pretrain'?"),
    ([TOKENIZER, SFT, named("e", EVAL, compare=["start"])], "no training stage 'start'"),
])
def test_stages_that_do_not_follow_from_each_other(stages: list[Any], said: str) -> None:
    with pytest.raises(VicugnaError) as caught:
        of(*stages)
    assert said in str(caught.value)


@pytest.mark.parametrize(("stages", "said"), [
    ([TOKENIZER, SFT], "the tokenizer is that of model.start"),
    ([EVAL, RELEASE], "no stage before it trains a model")])
def test_what_a_checkpoint_to_start_from_excludes(stages: list[Any], said: str) -> None:
    with pytest.raises(VicugnaError, match=said):
        of(*stages, model={"start": "org/name"})


@pytest.mark.parametrize(("setting", "said"), [
    ("sft.steps=5", "--set: unknown key 'sft.steps'. Did you mean 'stages.sft.steps'?"),
    ("stages.sfft.steps=4", "no stage is called 'sfft'. Did you mean 'sft'?"),
    ("stages.sft.sources.0=x", "stages.sft.sources.0 is part of a list. Set the whole list"),
    ("stages.eval.groups.reasoning.n=3", "is part of a list. Set the whole list"),
    ("stages.eval.compare_groups=[retreival]", "no group 'retreival'. Did you mean 'retrieval'?"),
    ("name=../elsewhere", "name: String should match pattern"),
    ("name=''", "name: String should match pattern"),
    ("stages.sft.stepz=3", "unknown key 'stages.sft.stepz'. Did you mean 'steps'?"),
    ("stages.sft.optimiser.clib=3", "unknown key 'stages.sft.optimiser.clib'. Did you mean 'clip'"),
    ("stages.sft.steps=0", "stages.sft.steps: Input should be greater than or equal to 1"),
    ("stages.sft.kind=slt", "unknown kind 'slt'. Did you mean 'sft'?"),
    ("stages.sft={steps: 3}", "a stage without its kind. Give the key kind"),
    ("stages.sft=3", "stages.2: Input should be a valid dictionary"),
    ("stages.sft.name=a.b", "stages.a.b.name: String should match pattern"),
    ("stages=3", "stages: Input should be a valid list"),
    ("stages={sft: {steps: 3}}", "stages: Input should be a valid list"),
    ("stages=[]", "stages: List should have at least 1 item"),
    ("date=tomorrow", "date: Input should be a valid date"),
])
def test_overrides_that_fit_nothing(setting: str, said: str) -> None:
    with pytest.raises(VicugnaError) as caught:
        read("tiny", [setting])
    assert said in str(caught.value)


def test_what_is_not_yaml_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("stages: [\n- {")
    with pytest.raises(VicugnaError, match="not valid YAML: while parsing a flow") as caught:
        read(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stages", [3, None, "sft", {"sft": {"steps": 1}}, [3, None, [], {}]])
def test_stages_that_are_none(stages: Any, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"stages": stages}))
    for settings in ((), ("stages.sft.steps=5",), ("sft.steps=5",)):
        with pytest.raises(VicugnaError):
            read(tmp_path / "r.yaml", settings)


def test_overrides_reach_stages_by_name(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(
        {"stages": [TOKENIZER, SFT, named("tune", SFT)], "data": {"sources": ["stdlib"]}}))
    made = read(tmp_path / "r.yaml", ["stages.tune.steps=7", "stages.tune.optimiser.kind=adamw",
                                      "stages.sft.steps=3", "model.depth=2", "date=2030-05-06"])
    assert [stage.model_dump()["steps"] for stage in made.stages[1:]] == [3, 7]
    assert made.model.depth == 2 and made.date.isoformat() == "2030-05-06"
    assert [stage.name for stage in read(tmp_path / "r.yaml", ["stages.sft=null"]).stages] == [
        "tokenizer", "tune"]


def test_a_recipe_is_found_by_path_then_by_name(tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    assert read("speedrun").name == "speedrun" and read("tiny").name == "tiny"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # a folder of that name is no recipe
    assert read("tiny").name == "tiny"
    (tmp_path / "speedrun").write_text(yaml.safe_dump(
        {"name": "mine", "stages": [TOKENIZER], "data": {"sources": ["stdlib"]}}))
    assert read("speedrun").name == "mine"
    package = tmp_path / "package"
    package.mkdir()
    (tmp_path / "speedrun").rename(package / "packaged.yaml")
    monkeypatch.setattr(recipe, "RECIPES", [package, package / "none"])
    assert read("packaged").name == "mine"
    for wrong, said in (("packagd", "Did you mean 'packaged'?"),
                        ("recipes/packaged.yml", "Did you mean 'packaged'?"), ("x", "Known: p")):
        with pytest.raises(VicugnaError, match="no such file, and no recipe of this") as caught:
            read(wrong)
        assert said in str(caught.value)


def test_the_earlier_form_is_answered_in_the_new_one(tmp_path: Path) -> None:
    shared = {"depth": [1, 2]}
    old: dict[str, Any] = {
        "name": "old", "data": {"sources": ["stdlib", {"source": "a.txt", "weight": 2}]},
        "tokenizer": {"vocab_size": 300},
        "pretrain": {"steps": 3, "sources": ["corpus", {"source": "b.txt", "weight": 3}]},
        "sft": {"steps": 4, "sources": ["a.txt", {
            "source": "task:reasoning.steps", "form": "text", "difficulty": shared}]},
        "rl": None, "eval": {"groups": [{**ITEMS, "difficulty": shared}], "compare": ["pretrain"]},
        "release": {"name": "Old: one", "summary": "It  is\nold."}}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    with pytest.raises(VicugnaError, match="stages are a list now") as caught:
        read(tmp_path / "old.yaml")
    shown = str(caught.value).partition("Write in their place: ")[2]
    assert "\n" not in shown
    new = {"name": "old", "data": old["data"], **yaml.safe_load(shown)}
    tokenizer = named("tokenizer", TOKENIZER, vocab_size=300, sources=[
        "corpus", {"source": "b.txt"}, {"source": "task:reasoning.steps", "difficulty": shared}])
    assert Recipe.model_validate(new) == Recipe.model_validate({
        **{key: old[key] for key in ("name", "data")}, "stages": [
            tokenizer, {**old["pretrain"], "kind": "pretrain"}, {**old["sft"], "kind": "sft"},
            {**old["eval"], "kind": "eval"},
            {"kind": "release", "title": "Old: one", "summary": "It  is\nold."}]})


@pytest.mark.parametrize("old", [{"sft": None}, {"eval": 3}, {"tokenizer": []}, {"rl": {}},
                                 {"pretrain": {"sources": [{}, 3, None]}, "data": None},
                                 {"sft": {"sources": 5}, "data": {"sources": "stdlib"}},
                                 {"sft": {"steps": 1}, "model": {"start": "x"}}])
def test_an_odd_recipe_of_the_earlier_form(old: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    with pytest.raises(VicugnaError, match="stages are a list now"):
        read(tmp_path / "old.yaml")


def test_a_release_is_added_where_the_recipe_has_none() -> None:
    stages = [TOKENIZER, SFT, EVAL]
    made, name = with_release(of(*stages, name="mine"))
    assert name == "release" and made.stage(name).model_dump()["title"] == "mine"
    assert with_release(made) == (made, "release")
    early = of(*stages, RELEASE, RL, named("e", EVAL))
    made, name = with_release(early)
    assert name == "release1" and made.evidence(name) == ["e"] and made.stages[:6] == early.stages
    with pytest.raises(VicugnaError, match="nothing scores the model"):
        with_release(of(TOKENIZER, SFT))


def test_the_stored_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    made = read("tiny", ["date=2031-02-03"])
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json"), sort_keys=False))
    assert read(tmp_path / "r.yaml").digest == made.digest
    assert "date: '2031-02-03'" in (tmp_path / "r.yaml").read_text()
    assert copy.deepcopy(made) == made
