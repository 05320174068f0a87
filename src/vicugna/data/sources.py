"""Where text comes from: files, the standard library, the Hugging Face Hub; and how to name it."""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vicugna import files, tasks
from vicugna.errors import VicugnaError
from vicugna.tokenizer import check_messages

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
    """A plain document, or a piece of a long one; `last` says that the document ends here."""

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
    """Check a recipe's list of sources; VicugnaError names the entry and the nearest right key."""
    if not isinstance(specs, list | tuple) or not specs:
        raise VicugnaError("not a list of sources, or an empty one", where, 'Try ["stdlib"]')
    return [_parse_spec(spec, f"{where}[{index}]") for index, spec in enumerate(specs)]


def _parse_spec(spec: str | dict[str, Any] | SourceSpec, where: str) -> SourceSpec:
    try:
        parsed = spec if isinstance(spec, SourceSpec) else SourceSpec.model_validate(spec)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        near = get_close_matches(key, SourceSpec.model_fields, n=1)
        fix = f'Did you mean "{near[0]}"?' if first["type"] == "extra_forbidden" and near else ""
        raise VicugnaError(first["msg"].lower() if not fix else f'unknown key "{key}"',
                           f"{where}.{key}" if key else where, fix) from error
    known = {field.name for field in fields(tasks.Difficulty)} | {"length_tokens"}
    for key in parsed.difficulty:
        if key not in known:
            raise VicugnaError(f'unknown key "{key}"', f"{where}.difficulty",
                               f"Use {', '.join(sorted(known))}")
    if parsed.source.startswith(TASK):
        tasks.get(parsed.source.removeprefix(TASK))
    elif parsed.difficulty or parsed.form != "chat":
        raise VicugnaError("difficulty and form are for task: sources only", where, "Leave it out")
    return parsed


def documents(spec: SourceSpec) -> Iterator[Text | Chat]:
    """The documents of any source but task:, streamed; at most `limit_bytes` of text.

    Raises VicugnaError naming file and line for anything that cannot be read.
    """
    if spec.source.startswith(HUB):
        return _limited(_hub_documents(spec), spec.limit_bytes)
    every = (_read_file(path, spec.column) for path in paths(spec))
    return _limited((document for one in every for document in one), spec.limit_bytes)


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
        raise _unknown(spec.source)
    if path.stat().st_size == 0:
        raise VicugnaError("the file is empty", spec.source, "Put some text in it")
    return [path]


def _unknown(source: str) -> VicugnaError:
    folder = Path(source).expanduser().parent
    nearby = [str(folder / p.name) for p in folder.iterdir()] if folder.is_dir() else []
    names = [STDLIB, *(TASK + name for name in tasks.TASKS), *nearby]
    near = get_close_matches(source, names, n=1, cutoff=0.6)
    fix = f'Did you mean "{near[0]}"?' if near else "Give a file, stdlib, task:NAME or hf:NAME"
    return VicugnaError("no such file or source", source, fix)


def stdlib_files() -> list[Path]:
    """This Python's own library, source with docstrings, in sorted order; no tests."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [p for p in root.rglob("*.py") if _NOT_STDLIB.isdisjoint(p.relative_to(root).parts)]
    return sorted(p for p in found if _is_text(p))


def _is_text(path: Path) -> bool:
    try:
        return "\0" not in path.read_text(encoding="utf-8") and path.stat().st_size > 0
    except (OSError, UnicodeDecodeError):
        return False


def _limited(every: Iterable[Text | Chat], limit: int | None) -> Iterator[Text | Chat]:
    left = float("inf") if limit is None else limit
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


def _read_file(path: Path, column: str | None) -> Iterator[Text | Chat]:
    if path.suffix == ".parquet":
        return _parquet_documents(path, column)
    if path.suffix in (".jsonl", ".ndjson"):
        return _jsonl_documents(path)
    return _text_pieces(path)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, ends kept."""
    try:
        with open(path, "rb") as file:
            head = file.read(8192)
            if b"\0" in head:  # before a "line" of a huge binary file is read
                raise _binary(path, head[:head.index(b"\0")].count(b"\n") + 1)
            file.seek(0)
            for number, raw in enumerate(file, 1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise VicugnaError(f"not UTF-8 text (byte {error.start + 1} of the line)",
                                       f"{path} line {number}", "Save it as UTF-8") from error
                if "\0" in line:
                    raise _binary(path, number)
                yield line
    except OSError as error:
        raise files.storage_error(error, path) from error


def _binary(path: Path, number: int) -> VicugnaError:
    return VicugnaError("this is a binary file (it holds NUL bytes)", f"{path} line {number}",
                        "Give UTF-8 text, .jsonl or .parquet")


def _text_pieces(path: Path) -> Iterator[Text]:
    """One document, cut where a line starts with no space: there tokens never straddle."""
    held: list[str] = []
    size = 0
    for line in _lines(path):
        if size >= PIECE and not line[0].isspace():
            yield Text("".join(held), last=False)
            held, size = [], 0
        held.append(line)
        size += len(line)
    if held:
        yield Text("".join(held))


def _jsonl_documents(path: Path) -> Iterator[Text | Chat]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            value = json.loads(line)
        except (RecursionError, ValueError) as error:
            reason = getattr(error, "msg", str(error))
            raise VicugnaError(f"not valid JSON: {reason}", where, "Correct the line") from error
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
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise VicugnaError("half of a surrogate pair in the text", where,
                               "Give valid Unicode") from error
        return Text(content)
    if not isinstance(content, list) or key == "text":
        raise VicugnaError(f"text must be a string and messages a list, but {key} is "
                           f"{type(content).__name__}", where, "Correct it")
    # Columnar files fill absent keys with nulls.
    messages = [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m
                for m in content]
    check_messages(messages, f"{where}, messages")
    if all(message["role"] != "assistant" for message in messages):
        raise VicugnaError("no assistant message to learn from", where, "Add one")
    return Chat(messages, value.get("tools"), where)


def _parquet_documents(path: Path, column: str | None) -> Iterator[Text | Chat]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = _column(names, column, str(path))
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[wanted]):
                for value in batch.column(0).to_pylist():
                    number += 1
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


def plain_texts(spec: SourceSpec) -> Iterator[str]:
    """What `documents` gives as mere text, without the form of chats."""
    for document in documents(spec):
        if isinstance(document, Text):
            yield document.text
        else:
            for message in document.messages:
                yield from (message[k] for k in ("reasoning", "content") if message.get(k))
