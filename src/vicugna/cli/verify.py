"""`vicugna verify`: check a release made by somebody else."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vicugna.cli import output
from vicugna.errors import VicugnaError


def verify(
    release: Annotated[str, typer.Argument(help="A release's folder, or its Hub id.")],
    sample: Annotated[int, typer.Option(min=0, help="Items to ask again, at least.")] = 64,
    as_json: output.Json = False,
) -> None:
    """Recompute every digest of RELEASE and re-score a sample; exit 1 if anything differs."""
    from vicugna import checkpoint, progress
    from vicugna.release import verify as check

    folder = Path(release).expanduser()
    if folder.exists() and not folder.is_dir():
        raise VicugnaError("a file, not a folder", release, "Give the folder of a release")
    if not folder.exists():
        folder = checkpoint.download(release, every_file=True)
    with progress.bar("verify", max(sample, 1)) as report:
        checks = check(folder, sample, lambda done, total: report(done, ""))
    good = all(one.ok for one in checks)
    if as_json:
        output.as_json({"release": release, "ok": good,
                        "checks": [asdict(one) for one in checks]})
    else:
        output.table(release, ("check", "holds", "detail"),
                     ((one.name, "yes" if one.ok else "NO", one.detail) for one in checks), 3)
        print("The release holds." if good else "The release does NOT hold.")
    raise typer.Exit(0 if good else 1)
