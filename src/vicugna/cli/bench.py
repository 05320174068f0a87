"""`vicugna bench`: the repository's side-by-side benchmarks."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from vicugna.cli import output
from vicugna.errors import VicugnaError, did_you_mean


def bench(
    name: Annotated[str, typer.Argument(help="A benchmark, such as train_throughput.")],
    folder: Annotated[Path, typer.Option(help="Where the benchmarks are.")] = Path("benchmarks"),
    as_json: output.Json = False,
) -> None:
    """Run a benchmark of the repository side by side with a peer; it ends with one JSON line.

    The benchmarks are not part of the installed package: run this in a clone of the repository.
    """
    path, known = folder / f"{name}.py", sorted(path.stem for path in folder.glob("*.py"))
    if not known:
        raise VicugnaError("no benchmarks here: they are in the repository, not in the package",
                           str(folder), "Run it in a clone of the repository, or give --folder")
    if name not in known:
        raise VicugnaError(f"no benchmark {name!r}", str(folder), did_you_mean(name, known))
    done = subprocess.run([sys.executable, str(path)], stdout=subprocess.PIPE if as_json else None,
                          text=True, check=False)
    if as_json and done.stdout.strip():
        print(done.stdout.strip().splitlines()[-1])
    raise typer.Exit(done.returncode if done.returncode in (0, 1) else 2)
