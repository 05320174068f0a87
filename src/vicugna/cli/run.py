"""`vicugna run` and `vicugna train`: a recipe's whole life, or one stage of it."""

from pathlib import Path
from typing import Annotated

import typer

from vicugna.cli import output

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe, such as recipes/speedrun.yaml.")]
Settings = Annotated[list[str] | None, typer.Option(
    "--set", help="Override one key: pretrain.steps=500. May be repeated.")]
Out = Annotated[Path | None, typer.Option(help="The run's folder; runs/NAME by default.")]


def run(recipe: RecipeArgument, settings: Settings = None, out: Out = None,
        as_json: output.Json = False) -> None:
    """Live a RECIPE: tokenizer, pretrain, sft, rl, eval, release. Stopped, it goes on."""
    _live(recipe, settings, out, None, as_json)


def train(recipe: RecipeArgument,
          stage: Annotated[str, typer.Option(help="tokenizer, pretrain, sft, rl, eval, release.")],
          settings: Settings = None, out: Out = None, as_json: output.Json = False) -> None:
    """One stage of a RECIPE; the same command under torchrun, on many processes."""
    _live(recipe, settings, out, stage, as_json)


def _live(path: Path, settings: list[str] | None, out: Path | None, stage: str | None,
          as_json: bool) -> None:
    from vicugna import evals
    from vicugna.distributed import process_group
    from vicugna.run import live
    from vicugna.training.recipe import read

    recipe = read(path, settings or [])
    folder = out or Path("runs") / recipe.name
    with process_group() as ranks:
        done = live(recipe, folder, ranks, stage, output.say if ranks.first else lambda line: None)
    if not ranks.first:
        return
    if as_json:
        output.as_json({"run": str(folder), "stages": {s: done.done(s) for s in done.stages}})
        return
    costs = [(stage, ended["cost"]) for stage in done.stages if (ended := done.done(stage))]
    output.table(f"{done.recipe.name}: stages", ("stage", "tokens", "FLOPs", "seconds", "peak GiB"),
                 ((stage, f"{cost.get('tokens', 0):,}", f"{cost.get('flops', 0):.2g}",
                   f"{cost.get('device_seconds', 0):,.0f}",
                   f"{cost.get('peak_memory_bytes', 0) / 2**30:.2f}") for stage, cost in costs))
    final = done.before("eval")
    if done.recipe.eval and done.done("eval") and final:
        results, _ = evals.read_results(done.place("eval") / final)
        output.scores(f"{done.recipe.name}: scores of the {final} model", results.rows)
    print(f"\nReport:  {folder / 'report.html'}")
    stage, name = ("release", "release") if done.done("release") else (final, "checkpoint")
    if stage and done.done(stage):
        for verb in ("chat", "serve", "verify") if stage == "release" else ("chat", "serve"):
            print(f"Next:    vicugna {verb} {done.place(stage) / name}")
