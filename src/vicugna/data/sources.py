"""Where text comes from: files, the standard library, the Hugging Face Hub; and how to name it."""

import glob
import io
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vicugna import files, tasks
from vicugna.chat import check_messages
from vicugna.errors import VicugnaError
from vicugna.tokenizer import valid_unicode

STDLIB, TASK, HUB = "stdlib", "task:", "hf:"
PIECE = 1 << 17  # characters of a long text that are held at once
_NOT_STDLIB = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__",
               "idle_test", "turtledemo", "encodings"}  # encodings: tables of numbers
Amount = int | float | Annotated[list[int | float], Field(min_length=2, max_length=2)]


class SourceSpec(BaseModel):
    """One entry of a recipe's list of sources. A bare string is short for {"source": string}."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(min_length=1)  # stdlib, a path or glob, hf:ORG/NAME, task:NAME
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)  # share of rows
    limit_bytes: int | None = Field(default=None, gt=0)  # of text, from the start
    column: str | None = None  # Parquet, hf: (default: text or messages)
    split: str = "train"  # hf:
    form: Literal["chat", "text"] = "chat"  # task:
    difficulty: dict[str, Amount] = {}  # task: numbers or [low, high], drawn per item

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class Text:
    """A plain document, or a piece of a long one, the last one or not."""

    text: str
    last: bool = True


@dataclass(frozen=True)
class Chat:
    """A finished conversation, and the line or row it came from."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    where: str


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
                           f"Use {', '.join(sorted(known))}")
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
                else len(json.dumps(document.messages)))
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
    if path.is_dir():
        raise VicugnaError("this is a folder", spec.source, f'Write "{spec.source}/**/*.txt"')
    if not path.exists():
        names = [STDLIB, *(TASK + name for name in tasks.TASKS), *map(str, path.parent.glob("*"))]
        near = get_close_matches(spec.source, names, n=1)
        fix = f'Did you mean "{near[0]}"?' if near else "Give a file, stdlib, task:NAME or hf:NAME"
        raise VicugnaError("no such file or source", spec.source, fix)
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
    if path.suffix == ".parquet":
        return _parquet_documents(path, column)
    return _jsonl_documents(path) if path.suffix in (".jsonl", ".ndjson") else _text_pieces(path)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, ends kept."""
    try:
        with open(path, "rb") as file:
            head = file.read(8192)
            file.seek(0)
            # Of a binary file, whose first "line" may be huge, only the head is looked at.
            for number, raw in enumerate(io.BytesIO(head) if b"\0" in head else file, 1):
                if b"\0" in raw:
                    raise VicugnaError("this is a binary file (it holds NUL bytes)",
                                       f"{path} line {number}", "Give UTF-8 text or .parquet")
                if b"\0" not in head:
                    yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise VicugnaError(f"not UTF-8 text (byte {error.start + 1} of the line)",
                           f"{path} line {number}", "Save it as UTF-8") from error
    except OSError as error:
        raise files.storage_error(error, path) from error


def _text_pieces(path: Path) -> Iterator[Text]:
    """One document, cut where a line starts with no space: there tokens never straddle."""
    held = ""
    for line in _lines(path):
        if len(held) >= PIECE and not line[0].isspace():
            yield Text(held, last=False)
            held = ""
        held += line
    if held:
        yield Text(held)


def _jsonl_documents(path: Path) -> Iterator[Text | Chat]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            value = json.loads(line)
        except (RecursionError, ValueError) as error:
            raise VicugnaError(f"not valid JSON: {getattr(error, 'msg', error)}", where,
                               "Correct the line") from error
        if not isinstance(value, dict):
            raise VicugnaError("not a JSON object", where, 'Write {"text": "..."}')
        yield _document(value, None, where)


def _document(value: dict[str, Any], column: str | None, where: str) -> Text | Chat:
    key = column or ("messages" if value.get("text") is None else "text")
    content = value.get(key)
    if content is None:
        raise VicugnaError(f'no "{column}"' if column else 'neither "text" nor "messages"', where,
                           'Write {"text": "..."} or {"messages": [...]}')
    if isinstance(content, str) and key != "messages":
        return Text(valid_unicode(content, where))
    if not isinstance(content, list) or key == "text":
        raise VicugnaError(f"text must be a string and messages a list, but {key} is "
                           f"{type(content).__name__}", where, "Correct it")
    # Columnar files fill absent keys with nulls.
    messages = [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m
                for m in content]
    check_messages(messages, f"{where}, messages", images=False)
    if all(message["role"] != "assistant" for message in messages):
        raise VicugnaError("no assistant message to learn from", where, "Add one")
    return Chat(messages, value.get("tools"), where)


def _parquet_documents(path: Path, column: str | None) -> Iterator[Text | Chat]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = _column(file.schema_arrow.names, column, str(path))
            batches = file.iter_batches(batch_size=256, columns=[wanted])
            values = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            for number, value in enumerate(values, 1):
                yield _document({wanted: value}, wanted, f"{path} row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise VicugnaError(f"not a readable Parquet file: {str(error).splitlines()[0]}",
                           str(path), "Write or download it again") from error


def _column(names: Sequence[str], column: str | None, where: str) -> str:
    for name in (column,) if column else ("text", "messages"):
        if name in names:
            return name
    raise VicugnaError(f"no column {column or 'text or messages'} (there are: "
                       f"{', '.join(names[:20])})", where, "Name one with column:")


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
    column = _column(dataset.column_names, spec.column, spec.source)
    for number, value in enumerate(dataset, 1):
        yield _document(value, column, f"{spec.source} row {number}")
