"""Files as rows (objects with named fields) or as plain text, whatever their format."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from vicugna import files
from vicugna.errors import VicugnaError

Row = tuple[str, dict[str, Any]]  # where it stands, and its fields
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
JSON_LINES, TABLES = (".jsonl", ".ndjson"), (".csv", ".tsv")
TURNS = ("messages", "conversations", "conversation")  # the second and third are ShareGPT's
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"),
         ("instruction", "response"), ("question", "answer"))  # of the user and the assistant
FIELDS = {"text", *TURNS, *(key for pair in PAIRS for key in pair)}  # of rows that are read
# Files that are not text, and what to do with them.
REFUSED = {
    **dict.fromkeys((".zip", ".7z", ".rar", ".tar", ".tgz"), "Unpack it, and name the files in it"),
    **dict.fromkeys((".arrow", ".feather", ".orc", ".avro", ".db", ".sqlite", ".pkl", ".pickle"),
                    "Save it as Parquet or as JSON Lines (.jsonl)"),
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "Save it as CSV"),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub"), "Save it as plain text"),
    **dict.fromkeys((".lz4", ".lz", ".z"), "Decompress it, or use .gz, .bz2, .xz or .zst"),
    **dict.fromkeys((".safetensors", ".gguf", ".bin", ".pt", ".npy", ".npz"),
                    "Those are tensors; give text or chats")}


def kind_of(path: Path) -> tuple[str, str]:
    """A file's format and compression, as the ends of its name say in any case: ("jsonl", "gz").
    VicugnaError for one that is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    suffix = suffixes[-1] if suffixes else ""
    if suffix in REFUSED:
        raise VicugnaError(f"{suffix} files are not read", str(path), REFUSED[suffix])
    if suffix == ".parquet" and compression:
        raise VicugnaError("compressed Parquet is not read", str(path),
                           "Decompress it: Parquet compresses its columns itself")
    return suffix, compression


def is_plain_text(path: Path) -> bool:
    """Whether a file is one document of plain text, not rows."""
    return kind_of(path)[0] not in (*JSON_LINES, *TABLES, ".json", ".parquet")


def rows(path: Path, columns: Callable[[list[str]], list[str]]) -> Iterator[Row]:
    """The rows of a file that has some; `columns` chooses those of a Parquet file that are read.
    VicugnaError, naming file and line, for what cannot be read."""
    suffix, _ = kind_of(path)
    if suffix == ".parquet":
        return _parquet_rows(path, columns)
    if suffix == ".json":
        return _json_rows(path)
    return _csv_rows(path) if suffix in TABLES else _json_lines(path, lines(path))


def lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, which may be compressed, with line ends."""
    number = 1
    try:
        with _open(path) as file:
            head = file.read(8192)
            rest: IO[bytes] | chain[bytes] = chain(
                io.BytesIO(head + file.readline()), file)
            # Of a binary file, whose first "line" may be huge, only the head is looked at.
            for number, raw in enumerate(io.BytesIO(head) if b"\0" in head else rest, 1):
                if b"\0" in raw:
                    raise VicugnaError("this is a binary file (it holds NUL bytes)",
                                       f"{path} line {number}", "Give UTF-8 text or .parquet")
                if b"\0" not in head:
                    yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise VicugnaError(f"not UTF-8 text (byte {error.start + 1} of the line)",
                           f"{path} line {number}", "Save it as UTF-8") from error
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, ValueError) as error:
        raise VicugnaError(f"it cannot be decompressed: {error}", str(path),
                           "Compress or download it again") from error
    except OSError as error:
        if kind_of(path)[1] and error.errno is None:  # raised by a decompressor
            raise VicugnaError(f"it cannot be decompressed: {error}", str(path),
                               "Compress or download it again") from error
        raise files.storage_error(error, path) from error


def _open(path: Path) -> IO[bytes]:
    compression = kind_of(path)[1]
    if compression == ".zst":
        import pyarrow  # heavy

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(compression, open)
    return cast(IO[bytes], opener(path, "rb"))


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise VicugnaError("not a JSON object", where, 'Write {"text": "..."}')
    return where, value


def _json_lines(path: Path, given: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(given, 1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                yield _object(json.loads(line), where)
            except (RecursionError, ValueError) as error:
                raise VicugnaError(f"not valid JSON: {getattr(error, 'msg', error)}", where,
                                   "Correct the line") from error


def _json_rows(path: Path) -> Iterator[Row]:
    """Rows of a .json file: an array of objects, an object with one such array in it, an object
    that is itself a row, or JSON Lines."""
    text = "".join(lines(path))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(path, iter(text.split("\n")))
            return
        raise VicugnaError(f"not valid JSON: {error.msg}", f"{path} line {error.lineno}",
                           "Correct the line") from error
    except RecursionError as error:
        raise VicugnaError("not valid JSON: it is nested too deeply", str(path),
                           "Use JSON Lines (.jsonl)") from error
    if isinstance(value, dict) and value.keys().isdisjoint(FIELDS):
        inside = {key: rows for key, rows in value.items() if isinstance(rows, list) and rows
                  and all(isinstance(row, dict) for row in rows)}
        if len(inside) != 1:
            raise VicugnaError("an object without one list of rows in it (there are: "
                               f"{', '.join(value)[:200]})", str(path),
                               "Save the rows as an array, or as JSON Lines (.jsonl)")
        [value] = inside.values()
    listed = value if isinstance(value, list) else [value]
    for number, one in enumerate(listed, 1):
        yield _object(one, f"{path} item {number}")


def _csv_rows(path: Path) -> Iterator[Row]:
    """Rows of a CSV or TSV file, whose first line names the columns; separated by what that line
    has most of: commas, semicolons or tabs."""
    given = lines(path)
    header = next(given, "")
    reader = csv.reader(chain([header], given), strict=True,
                        delimiter=max(",;\t", key=header.count))
    limit = csv.field_size_limit(1 << 31 - 1)
    try:
        names = next(reader, [])
        first = reader.line_num + 1
        for values in reader:
            where, first = f"{path} line {first}", reader.line_num + 1
            if not values:
                continue
            if len(values) != len(names):
                raise VicugnaError(f"{len(values)} fields, but the first line names {len(names)}",
                                   where, "Put fields with commas or quotes into double quotes")
            yield where, {name.strip(): value for name, value in
                          zip(names, values, strict=True) if value}
    except csv.Error as error:
        raise VicugnaError(f"not valid CSV: {error}", f"{path} line {reader.line_num}",
                           "Put the field into double quotes, those in it doubled") from error
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(path: Path, columns: Callable[[list[str]], list[str]]) -> Iterator[Row]:
    import pyarrow.parquet  # heavy

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            chosen = columns(file.schema_arrow.names)
            batches = file.iter_batches(batch_size=256, columns=chosen)
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, 1):
                yield f"{path} row {number}", without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise VicugnaError(f"not a readable Parquet file: {str(error).splitlines()[0]}",
                           str(path), "Write or download it again") from error


def without_nulls(value: Any) -> Any:
    """A value of a columnar file, which has filled absent fields with nulls, without them; a map,
    which is a list of pairs, as an object."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        if value and all(isinstance(one, tuple) and len(one) == 2 for one in value):
            return {key: without_nulls(one) for key, one in value if one is not None}
        return list(map(without_nulls, value))
    return value
