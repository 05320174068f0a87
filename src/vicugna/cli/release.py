"""`vicugna release`: a release whose every number is bound to its bytes."""

from pathlib import Path
from typing import Annotated

import typer

from vicugna.cli import output
from vicugna.errors import VicugnaError


def release(
    run: Annotated[Path, typer.Argument(help="A run's folder, such as runs/speedrun.")],
    as_json: output.Json = False,
) -> None:
    """Make the release of a finished RUN; refused (exit 1) if its evidence is not valid."""
    from vicugna.distributed import Ranks
    from vicugna.files import read_json
    from vicugna.run import run_recipe
    from vicugna.training.recipe import read, with_release

    if not (run / "recipe.yaml").exists():
        raise VicugnaError("not a run's folder: it has no recipe.yaml", str(run),
                           "Give the folder that vicugna run made")
    recipe, stage = with_release(read(run / "recipe.yaml"))
    done = run_recipe(recipe, run, Ranks(), stage, output.say)
    folder = done.path(stage) / "release"
    manifest = read_json(folder / "manifest.json")
    if as_json:
        output.as_json({"release": str(folder), "release_digest": manifest["release_digest"],
                        "model_digest": manifest["model_digest"]})
    else:
        print(f"Release: {folder}\nDigest:  {manifest['release_digest']}")
