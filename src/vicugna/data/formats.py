"""Files as rows (objects with named fields) or as plain text, whatever their format."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any

from vicugna import files
from vicugna.errors import VicugnaError

Row = tuple[str, dict[str, Any]]  # where it stands, and its fields
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
REFUSED = (  # files that are not text
    ".zip", ".7z", ".rar", ".tar", ".tgz", ".lz4", ".lz", ".z", ".arrow", ".feather", ".orc",
    ".avro", ".db", ".sqlite", ".pkl", ".pickle", ".xlsx", ".xls", ".ods", ".numbers", ".pdf",
    ".doc", ".docx", ".odt", ".epub", ".safetensors", ".gguf", ".bin", ".pt", ".npy", ".npz")
_NOT_SPACE = re.compile(r"\S")


def kind_of(path: Path) -> tuple[str, str]:
    """A file's format and compression, as the ends of its name say in any case: (".jsonl", ".gz").
    VicugnaError for one that is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    suffix = suffixes[-1] if suffixes else ""
    if suffix in REFUSED or (suffix == ".parquet" and compression):
        raise VicugnaError(f"{suffix}{compression} files are not read", str(path),
                           "Unpack it, or save it as .jsonl, .json, .csv, .parquet or plain text")
    return suffix, compression


def rows(path: Path, columns: Callable[[list[str]], list[str]]) -> Iterator[Row] | None:
    """The rows of a file, or None if it is plain text; `columns` chooses those of a Parquet file
    that are read. VicugnaError, naming file and line, for what cannot be read."""
    match kind_of(path)[0]:
        case ".parquet":
            return _parquet_rows(path, columns)
        case ".json":
            return _json_rows(path)
        case ".jsonl" | ".ndjson" | ".jsonlines" | ".jl":
            return json_lines(path)
        case ".csv" | ".tsv":
            return _csv_rows(path)
    return None


def lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, which may be compressed, with line ends."""
    number = 1
    try:
        with _open(path) as file:
            # Of a binary file, whose first "line" may be huge, only the head is looked at.
            binary = b"\0" in (head := file.peek(8192))
            for number, raw in enumerate(io.BytesIO(head) if binary else file, 1):
                if b"\0" in raw:
                    raise VicugnaError("this is a binary file (it holds NUL bytes)",
                                       f"{path} line {number}", "Give UTF-8 text or .parquet")
                if not binary:
                    yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise VicugnaError(f"not UTF-8 text (byte {error.start + 1} of the line)",
                           f"{path} line {number}", "Save it as UTF-8") from error
    except (EOFError, lzma.LZMAError, zlib.error, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise files.storage_error(error, path) from error
        raise VicugnaError(f"it cannot be decompressed: {error}", str(path),
                           "Compress or download it again") from error


def _open(path: Path) -> Any:
    compression = kind_of(path)[1]
    if compression == ".zst":
        import pyarrow  # heavy

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(compression, open)(path, "rb")


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise VicugnaError("not a JSON object", where, "Give each row as an object with fields")
    return where, value


def _not_json(error: Exception, where: str) -> VicugnaError:
    return VicugnaError(f"not valid JSON: {getattr(error, 'msg', error)}", where,
                        "Correct the line")


def json_lines(path: Path) -> Iterator[Row]:
    """The objects of a file that has one a line. Raises as `rows` does."""
    for number, line in enumerate(lines(path), 1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                yield _object(json.loads(line), where)
            except (RecursionError, ValueError) as error:
                raise _not_json(error, where) from error


def _json_rows(path: Path) -> Iterator[Row]:
    """Rows of a .json file: an array of objects, or objects one after another."""
    text, at, numbers = "".join(lines(path)), 0, count(1)
    while start := _NOT_SPACE.search(text, at):
        try:
            value, at = json.JSONDecoder().raw_decode(text, start.start())
        except (RecursionError, ValueError) as error:
            line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise _not_json(error, f"{path}{line}") from error
        for one in value if isinstance(value, list) else [value]:
            yield _object(one, f"{path} item {next(numbers)}")


def _csv_rows(path: Path) -> Iterator[Row]:
    """Rows of a CSV or TSV file, whose first line names the columns; separated by what that line
    has most of: commas, semicolons or tabs."""
    given = lines(path)
    header = next(given, "")
    reader = csv.reader(chain([header], given), strict=True,
                        delimiter=max(",;\t", key=header.count))
    csv.field_size_limit(1 << 30)  # a field may hold a whole chat
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
