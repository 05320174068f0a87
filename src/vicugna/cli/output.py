"""What verbs print: one JSON object, or tables."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # it imports PyTorch, which takes seconds: not for --help
    from vicugna.evals import Row

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ModelArgument = Annotated[str, typer.Argument(
    help="A folder (Hugging Face, Meta), a GGUF file, a Hub id, or smollm2 (make smollm2).")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto (as stored).")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")]


def say(line: str) -> None:
    """A line for people, on standard error."""
    print(line, file=sys.stderr, flush=True)


def as_json(value: Any) -> None:
    """The one JSON object of a `--json` call, on standard output."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], right: int = 1) -> None:
    """A table on standard output; the columns from `right` on are aligned to the right."""
    made = Table(title=title, title_justify="left")
    for number, name in enumerate(head):
        made.add_column(name, justify="right" if number >= right else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 110).print(made)


def scores(title: str, rows: Iterable["Row"]) -> None:
    """An evaluation's table."""
    head = "group", "task", "difficulty", "n", "accuracy", "95% interval", "error", "truncated"
    table(title, head, (
        (row.group, row.task, row.difficulty, str(row.n), f"{row.accuracy:.1%}",
         f"{row.low:.1%} - {row.high:.1%}", str(row.error), str(row.truncated))
        for row in rows), right=3)
