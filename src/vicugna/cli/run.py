"""`vicugna run` and `vicugna train`: all stages of a recipe, or one of them."""

from pathlib import Path
from typing import Annotated

import typer

from vicugna.cli import output

RecipeArgument = Annotated[str, typer.Argument(
    help="A recipe's file, or the name of one of ours: speedrun, tiny, finetune.")]
Settings = Annotated[list[str] | None, typer.Option(
    "--set", help="Override one key: model.depth=8, or stages.NAME.steps=500. May be repeated.")]
Out = Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME by default.")]


def run(recipe: RecipeArgument, settings: Settings = None, out: Out = None,
        as_json: output.Json = False) -> None:
    """Run all stages of RECIPE in order; the same command resumes a run that was stopped."""
    _run(recipe, settings, out, None, as_json)


def train(recipe: RecipeArgument,
          stage: Annotated[str, typer.Option(help="The stage's name in the recipe.")],
          settings: Settings = None, out: Out = None, as_json: output.Json = False) -> None:
    """Run one stage of RECIPE, alone or under torchrun."""
    _run(recipe, settings, out, stage, as_json)


def _run(name: str, settings: list[str] | None, out: Path | None, only: str | None,
         as_json: bool) -> None:
    from vicugna import evals
    from vicugna.distributed import process_group
    from vicugna.run import run_recipe
    from vicugna.training.recipe import EvalSpec, ReleaseSpec, StageSpec, read

    recipe = read(name, settings or [])
    folder = out or Path("runs") / recipe.name
    with process_group() as ranks:
        done = run_recipe(recipe, folder, ranks, only,
                          output.say if ranks.first else lambda line: None)
    if not ranks.first:
        return
    records = {stage.name: done.record(stage.name) for stage in recipe.stages}
    if as_json:
        output.as_json({"run": str(folder), "stages": records})
        return
    finished = [stage for stage in recipe.stages if records[stage.name]]
    costs = [(name, record["cost"]) for name, record in records.items() if record]
    output.table(f"{recipe.name}: stages", ("stage", "tokens", "FLOPs", "seconds", "peak GiB"),
                 ((name, f"{cost.get('tokens', 0):,}", f"{cost.get('flops', 0):.2g}",
                   f"{cost.get('device_seconds', 0):,.0f}",
                   f"{cost.get('peak_memory_bytes', 0) / 2**30:.2f}") for name, cost in costs))
    for stage in [one for one in finished if isinstance(one, EvalSpec)][-1:]:
        model = recipe.scored(stage)[-1]
        results, _ = evals.read_results(done.path(stage.name) / model)
        output.scores(f"{recipe.name}: scores of the {model} model", results.rows)
    print(f"\nReport:  {folder / 'report.html'}")
    for last in [one for one in finished if isinstance(one, StageSpec | ReleaseSpec)][-1:]:
        released = isinstance(last, ReleaseSpec)
        model_folder = done.path(last.name) / ("release" if released else "checkpoint")
        for verb in ("chat", "serve", "verify") if released else ("chat", "serve"):
            print(f"Next:    vicugna {verb} {model_folder}")
