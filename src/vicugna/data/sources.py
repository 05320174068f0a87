"""Sources of training data: files, the standard library, the Hugging Face Hub; how to name them."""

import glob
import json
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vicugna import files, tasks
from vicugna.data import formats
from vicugna.data.records import Chat, Text, columns, to_document
from vicugna.errors import VicugnaError, did_you_mean

STDLIB, TASK, HUB = "stdlib", "task:", "hf:"
CHUNK = 1 << 17  # characters of a long text that are held at once
_NOT_STDLIB = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__",
               "idle_test", "turtledemo", "encodings"}  # encodings: tables of numbers
_ROWS = re.compile(r'\s*\[?\s*\{.{0,200}?"(messages|conversations?|text|prompt|question)"\s*:')
Amount = int | float | Annotated[list[int | float], Field(min_length=2, max_length=2)]


class SourceSpec(BaseModel):
    """One entry of a recipe's list of sources. A bare string is short for {"source": string}."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(min_length=1)  # stdlib, a path or glob, hf:ORG/NAME, task:NAME
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)  # share of rows
    limit_bytes: int | None = Field(default=None, gt=0)  # of text, from the start
    column: str | None = None  # of rows (default: the one whose name is known)
    split: str = "train"  # hf:
    form: Literal["chat", "text"] = "chat"  # task:
    difficulty: dict[str, Amount] = {}  # task: numbers or [low, high], drawn per item

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


def parse_specs(specs: Sequence[str | dict[str, Any] | SourceSpec],
                where: str = "data.sources") -> list[SourceSpec]:
    """Check a recipe's list of sources; VicugnaError names the entry and the key."""
    if not isinstance(specs, list | tuple) or not specs:
        raise VicugnaError("not a list of sources, or an empty one", where, 'Try ["stdlib"]')
    return [_parse_spec(spec, f"{where}[{index}]") for index, spec in enumerate(specs)]


def _parse_spec(spec: str | dict[str, Any] | SourceSpec, where: str) -> SourceSpec:
    try:
        parsed = spec if isinstance(spec, SourceSpec) else SourceSpec.model_validate(spec)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, [where, *first["loc"]]))
        raise VicugnaError(first["msg"].lower(), place, "Correct it") from error
    known = {field.name for field in fields(tasks.Difficulty)} | {"length_tokens"}
    for key in parsed.difficulty.keys() - known:
        raise VicugnaError(f'unknown key "{key}"', f"{where}.difficulty",
                           did_you_mean(key, sorted(known)))
    if parsed.source.startswith(TASK):
        tasks.get(parsed.source.removeprefix(TASK))
    elif parsed.difficulty or parsed.form != "chat":
        raise VicugnaError("difficulty and form are for task: sources only", where, "Leave it out")
    return parsed


def documents(spec: SourceSpec) -> Iterator[Text | Chat]:
    """The documents of any source but task:, streamed; at most `limit_bytes` of text. Raises
    VicugnaError naming file and line for anything that cannot be read."""
    every = (_hub_documents(spec) if spec.source.startswith(HUB) else
             chain.from_iterable(_read_file(path, spec.column) for path in paths(spec)))
    left = float("inf") if spec.limit_bytes is None else spec.limit_bytes
    begun = False  # a document whose beginning was already given has to be ended
    for document in every:
        size = (len(document.text.encode()) if isinstance(document, Text)
                else len(json.dumps(document.messages, default=str)))
        if size > left:
            if isinstance(document, Text) and (left > 0 or begun):
                yield Text(document.text.encode()[:int(left)].decode(errors="ignore"))
            return
        left -= size
        begun = isinstance(document, Text) and not document.last
        yield document


def content_digest(spec: SourceSpec) -> str:
    """SHA-256 that changes when any byte that `documents` would read changes."""
    what: Any = (_load_hub(spec)._fingerprint if spec.source.startswith(HUB) else
                 [files.digest_file(path) for path in paths(spec)])
    return files.digest_of([what, spec.column, spec.limit_bytes])


def paths(spec: SourceSpec) -> list[Path]:
    """The files of a source, sorted. VicugnaError when there are none."""
    if spec.source == STDLIB:
        return stdlib_files()
    if glob.has_magic(spec.source) and not os.path.exists(spec.source):
        found = sorted(Path(p) for p in glob.glob(spec.source, recursive=True) if os.path.isfile(p))
        if not found:
            raise VicugnaError("no file matches", spec.source, "Check the pattern")
        return found
    path = Path(spec.source).expanduser()
    if not path.exists():  # the chats of a recipe that comes with the package
        path = next((packaged for folder in files.RECIPES
                     if (packaged := folder.parent / path).parent == folder
                     and packaged.is_file()), path)
    if path.is_dir():
        raise VicugnaError("this is a folder", spec.source, f'Write "{spec.source}/**/*.txt"')
    if not path.exists():
        names = [STDLIB, *(TASK + name for name in tasks.TASKS), *map(str, path.parent.glob("*"))]
        near = did_you_mean(spec.source, names)  # or all names, which may be many
        raise VicugnaError("no such file or source", spec.source, near if near.startswith("Did")
                           else "Give a file, stdlib, task:NAME or hf:NAME")
    if path.stat().st_size == 0:
        raise VicugnaError("the file is empty", spec.source, "Put some text in it")
    return [path]


@cache
def stdlib_files() -> list[Path]:
    """This Python's own library, source with docstrings, in sorted order; no tests."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        if _NOT_STDLIB.isdisjoint(path.relative_to(root).parts):
            with suppress(OSError, UnicodeDecodeError):
                text = path.read_text(encoding="utf-8")
                found += [path] if text and "\0" not in text else []
    return found


def _read_file(path: Path, column: str | None) -> Iterator[Text | Chat]:
    rows = formats.rows(path, lambda names: columns(names, column, str(path)))
    if rows is None:
        return _text_chunks(path)
    return (to_document(row, column, where) for where, row in rows)


def _text_chunks(path: Path) -> Iterator[Text]:
    """One document, cut where a line starts with no space: there tokens never straddle."""
    held = ""
    for number, line in enumerate(formats.lines(path)):
        if not number and _ROWS.match(line):
            raise VicugnaError("it holds JSON, but its name says plain text", str(path),
                               "Let its name end in .jsonl or .json")
        if len(held) >= CHUNK and not line[0].isspace():
            yield Text(held, last=False)
            held = ""
        held += line
    if held:
        yield Text(held)


def _load_hub(spec: SourceSpec) -> Any:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise VicugnaError("the datasets package is not installed", spec.source,
                           "Run: pip install 'vicugna[hub]'") from error
    try:
        return load_dataset(spec.source.removeprefix(HUB), split=spec.split)
    except Exception as error:  # the library raises many kinds
        raise VicugnaError(f"cannot load this dataset: {str(error).strip().splitlines()[0]}",
                           spec.source, "Check its name, split and your connection") from error


def _hub_documents(spec: SourceSpec) -> Iterator[Text | Chat]:
    dataset = _load_hub(spec)
    columns(dataset.column_names, spec.column, spec.source)
    for number, row in enumerate(dataset, 1):
        yield to_document(formats.without_nulls(row), spec.column, f"{spec.source} row {number}")
