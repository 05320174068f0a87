"""`vicugna run` and `vicugna train`: a recipe's whole life, or one stage of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe, such as recipes/speedrun.yaml.")]
Settings = Annotated[list[str] | None, typer.Option(
    "--set", help="Override one key: pretrain.steps=500. May be repeated.")]
Out = Annotated[Path | None, typer.Option(
    help="The run's folder; runs/NAME by default, NAME being the recipe's.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def run(recipe: RecipeArgument, settings: Settings = None, out: Out = None,
        as_json: Json = False) -> None:
    """Live a RECIPE: tokenizer, pretrain, sft, rl, eval, release. Stopped, it goes on."""
    _live(recipe, settings, out, None, as_json)


def train(recipe: RecipeArgument,
          stage: Annotated[str, typer.Option(help="tokenizer, pretrain, sft, rl, eval, release.")],
          settings: Settings = None, out: Out = None, as_json: Json = False) -> None:
    """One stage of a RECIPE; the same command under torchrun, on many processes."""
    _live(recipe, settings, out, stage, as_json)


def _live(path: Path, settings: list[str] | None, out: Path | None, stage: str | None,
          json_wanted: bool) -> None:
    from vicugna.run import live
    from vicugna.training.parallel import process_group
    from vicugna.training.recipe import read

    from . import output

    recipe = read(path, settings or [])
    folder = out or Path("runs") / recipe.name
    with process_group() as ranks:
        say = output.say if ranks.first else lambda line: None
        done = live(recipe, folder, ranks, stage, say)
        if not ranks.first:
            return
    if json_wanted:
        output.as_json({"run": str(folder), "stages": {s: done.done(s) for s in done.stages}})
    else:
        _summary(done, folder)


def _summary(done: object, folder: Path) -> None:
    """The closing table and the next commands."""
    from vicugna import evals
    from vicugna.run import Run

    from . import output

    assert isinstance(done, Run)
    costs = [(stage, (done.done(stage) or {}).get("cost", {})) for stage in done.stages
             if done.done(stage)]
    output.table(f"{done.recipe.name}: stages", ("stage", "tokens", "FLOPs", "seconds", "peak GiB"),
                 ((stage, f"{cost.get('tokens', 0):,}", f"{cost.get('flops', 0):.2g}",
                   f"{cost.get('device_seconds', 0):,.0f}",
                   f"{cost.get('peak_memory_bytes', 0) / 2**30:.2f}") for stage, cost in costs))
    final = done.before("eval")
    if done.recipe.eval is not None and done.done("eval") and final:
        results, _ = evals.read_results(done.place("eval") / final)
        output.scores(f"{done.recipe.name}: scores of the {final} model", results.rows)
    model = done.place("release") / "release" if done.done("release") else (
        done.place(final) / "checkpoint" if final and done.done(final) else None)
    print(f"\nReport:  {folder / 'report.html'}")
    if model is not None:
        for verb in ("chat", "serve", *(("verify",) if done.done("release") else ())):
            print(f"Next:    vicugna {verb} {model}")
