"""`vicugna bench`: the repository's side-by-side benchmarks."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from vicugna.cli import output
from vicugna.errors import VicugnaError


def bench(
    name: Annotated[str, typer.Argument(help="A benchmark, such as train_throughput.")],
    folder: Annotated[Path, typer.Option(help="Where the benchmarks are.")] = Path("benchmarks"),
    as_json: output.Json = False,
) -> None:
    """Run one of the repository's BENCHMARKS; each ends with one JSON line."""
    path = folder / f"{name}.py"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.py"))) or "none here"
        raise VicugnaError(f"no benchmark {name!r}", str(folder), f"There are: {known}")
    done = subprocess.run([sys.executable, str(path)], stdout=subprocess.PIPE if as_json else None,
                          text=True, check=False)
    if as_json and done.stdout.strip():
        print(done.stdout.strip().splitlines()[-1])
    raise typer.Exit(done.returncode if done.returncode in (0, 1) else 2)
