"""`vicugna verify`: check a release made by somebody else."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vicugna.cli import output
from vicugna.errors import VicugnaError


def verify(
    release: Annotated[Path, typer.Argument(help="A release's folder.")],
    sample: Annotated[int, typer.Option(min=0, help="Items to ask again, at least.")] = 64,
    as_json: output.Json = False,
) -> None:
    """Recompute every digest of RELEASE and re-score a sample; exit 1 if anything differs."""
    from vicugna import progress
    from vicugna.release import verify as check

    if not release.is_dir():
        raise VicugnaError("no such folder", str(release), "Give a release's folder")
    with progress.bar("verify", max(sample, 1)) as report:
        checks = check(release, sample, lambda done, total: report(done, ""))
    good = all(one.ok for one in checks)
    if as_json:
        output.as_json({"release": str(release), "ok": good,
                        "checks": [asdict(one) for one in checks]})
    else:
        output.table(str(release), ("check", "holds", "detail"),
                     ((one.name, "yes" if one.ok else "NO", one.detail) for one in checks), 3)
        print("The release holds." if good else "The release does NOT hold.")
    raise typer.Exit(0 if good else 1)
