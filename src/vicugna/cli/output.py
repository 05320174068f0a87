"""What verbs print: one JSON object, or tables."""

import io
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vicugna.errors import VicugnaError

if TYPE_CHECKING:  # it imports PyTorch, which takes seconds: not for --help
    from vicugna.evals import Row

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ModelArgument = Annotated[str, typer.Argument(
    help="A folder (Hugging Face, Meta), a GGUF file, a Hub id, or smollm2 (make smollm2).")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto (as stored).")]
Weights = Annotated[str, typer.Option(
    help="How matrices are kept on the CPU: auto (a GGUF's quantised ones as they are, others in "
    "--dtype), bf16, int8, int4, or float (all in --dtype).")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")]
Memory = Annotated[float | None, typer.Option(
    min=0, help="GiB of KV cache at most; default: half of what is free.")]


def prepare_streams() -> None:
    """Escape what the encoding of an output stream lacks, and make undecodable input an error (in
    the C locale it would become lone surrogates); a closed stream is as /dev/null."""
    for name, mode, errors in (("stdin", "r", "strict"), ("stdout", "w", "backslashreplace"),
                               ("stderr", "w", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open to the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def as_text(name: str, where: str) -> str:
    """A command line argument; VicugnaError if bytes in it are not in the locale's encoding."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise VicugnaError(f"not text in {sys.getfilesystemencoding()}", where,
                           "Write it in the encoding of your locale (see `locale`)") from error
    return name


def as_bytes(memory: float | None) -> int | None:
    """The value of a `Memory` option in bytes."""
    return None if memory is None else round(memory * 2**30)


def say(line: str) -> None:
    """A line for people, on standard error."""
    print(line, file=sys.stderr, flush=True)


def as_json(value: Any) -> None:
    """The one JSON object of a `--json` call, on standard output."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(value, ensure_ascii=not unicode), flush=True)


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
