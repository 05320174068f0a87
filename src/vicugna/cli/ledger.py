"""`vicugna ledger`: every attempt ever made in a workspace."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vicugna.cli import output
from vicugna.errors import VicugnaError


def ledger(
    workspace: Annotated[Path, typer.Argument(envvar="VICUGNA_WORKSPACE",
                                              help="The folder of the runs.")] = Path("runs"),
    as_json: output.Json = False,
) -> None:
    """List all attempts, with lineage, cost and outcome; exit 1 if the chain is broken."""
    from vicugna.ledger import Ledger

    path = workspace / "ledger.sqlite"
    if not path.exists():
        raise VicugnaError("no ledger here yet", str(path), "Run a recipe first")
    found = Ledger(path)
    problem, attempts = found.check(), found.attempts()
    if as_json:
        output.as_json({"intact": problem is None, "problem": problem,
                        "attempts": [asdict(one) for one in attempts]})
    else:
        columns = ("attempt", "purpose", "outcome", "opened", "made", "from", "tokens", "s")
        output.table(str(path), columns, (
            (one.id, one.purpose, one.outcome, one.opened[:16],
             str(one.result.get("digest", ""))[:8],
             " ".join(parent[:8] for parent in one.parents), f"{one.cost.get('tokens', 0):,}",
             f"{one.cost.get('device_seconds', 0):,.0f}") for one in attempts), 6)
        print(f"The chain is broken at {problem}" if problem else "The chain is intact.")
    raise typer.Exit(1 if problem else 0)
