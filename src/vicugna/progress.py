"""Progress for people: a bar with rate and time left on standard error, silent elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

Report = Callable[[int, str], None]


@contextmanager
def bar(title: str, total: int, wanted: bool = True) -> Iterator[Report]:
    """Yield `report(done, note)`. Draws only if `wanted` and standard error is a terminal."""
    if not wanted or not sys.stderr.isatty():
        yield lambda done, note: None
        return
    columns = (TextColumn("{task.description:<10}"), BarColumn(20), MofNCompleteColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total, note="")
        yield lambda done, note: progress.update(task, completed=done, note=note)
