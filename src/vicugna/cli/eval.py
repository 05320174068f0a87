"""`vicugna eval`: scores with error bars; every planned item counts."""

import os
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from vicugna.cli import output
from vicugna.errors import VicugnaError


def evaluate(
    model: output.ModelArgument,
    items: Annotated[Path | None, typer.Option(help="Your own questions (JSONL): prompt or "
                                               "messages, answers, context_file, task.")] = None,
    recipe: Annotated[str | None, typer.Option(
        help="A recipe (a file or a name): ask the groups of its last eval stage.")] = None,
    out: Annotated[Path | None, typer.Option(
        help="Results folder; default: WORKSPACE/evals/DIGEST.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="--items: tokens per reply.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="--items: batch size.")] = 32,
    date: Annotated[datetime | None, typer.Option(
        formats=["%Y-%m-%d"], help="The date that chat templates see; default: the recipe's, "
        "or 2026-01-01.")] = None,
    dtype: output.Dtype = "float32",
    weights: output.Weights = "auto",
    device: output.Device = "cpu",
    workspace: Annotated[Path, typer.Option(envvar="VICUGNA_WORKSPACE",
                                            help="Folder of the ledger.")] = Path("runs"),
    as_json: output.Json = False,
) -> None:
    """Score MODEL on a recipe's eval groups (--recipe) or your own questions (--items)."""
    if (items is None) == (recipe is None):
        raise VicugnaError("give either --items or --recipe", "vicugna eval",
                           "For example --recipe speedrun")
    import vicugna
    from vicugna import evals, files
    from vicugna.evals.evaluate import evaluate as run_evaluation
    from vicugna.ledger import Ledger
    from vicugna.training.recipe import DATE, EvalSpec, read

    loaded = vicugna.load(model, dtype, weights, device)
    tokenizer, day, own_tasks = loaded.text_tokenizer(), date and date.date(), {}
    if items is not None:
        plan, task = evals.plan_items(items, tokenizer, day or DATE, max_new_tokens)
        own_tasks, source = {task.name: task}, files.digest_file(items)
    elif recipe is not None:
        asked = read(recipe)
        stages = [stage for stage in asked.stages if isinstance(stage, EvalSpec)]
        if not stages:
            raise VicugnaError("the recipe has no eval stage", recipe, "Add one")
        plan = evals.build_plan(stages[-1].groups, tokenizer, day or asked.date)
        batch, source = stages[-1].batch, asked.digest
    folder = out or workspace / "evals" / f"{loaded.digest[:12]}-{plan.digest[:12]}"
    results = run_evaluation(loaded, plan, batch, folder, Ledger(workspace / "ledger.sqlite"),
                             source, os.path.abspath(folder), own_tasks)
    if as_json:
        output.as_json({"folder": str(folder), **results.to_dict()})
    else:
        output.scores(f"{model}  {loaded.digest[:12]}", results.rows)
        print(f"Results: {folder}")
