"""Files that are never half-written, and folders that one process owns at a time."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vicugna.errors import VicugnaError

# Where what comes with this package is looked for by name: in the package, or beside its source.
RECIPES = [Path(__file__).parent / "recipes", Path(__file__).parents[2] / "recipes"]


def storage_error(error: OSError, path: str | Path) -> VicugnaError:
    """Turn an operating-system error about `path` into one that says what to do."""
    for numbers, what, fix in (
        ((errno.ENOSPC, errno.EDQUOT), "the disk is full",
         "Free some space and run the command again"),
        ((errno.EACCES, errno.EPERM, errno.EROFS), "no permission to write or read here",
         "Choose a folder you own, or change its permissions"),
        ((errno.ENOENT,), "no such file or folder", "Check the path"),
        ((errno.ENOTDIR, errno.EISDIR),
         "a file stands where a folder is needed, or the other way round", "Check the path"),
    ):
        if error.errno in numbers:
            return VicugnaError(what, str(path), fix)
    if error.errno is None:  # NumPy's, when not all that it wrote was taken
        return VicugnaError(f"it could not be written whole: {error}", str(path),
                            "Free some space and run the command again")
    return VicugnaError(error.strerror or str(error), str(path), "Check the path and the disk")


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Raise the block's OSErrors about `path` as storage_error() words them."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; when the block succeeds, fsync it and rename it over `path`.
    On any failure the temporary file is removed and `path` is as it was."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        try:
            _hold(handle)
            yield temporary
            _sync(temporary)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            os.close(handle)
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder; when the block succeeds, it takes the place of folder `path`.
    The old folder, if any, is removed only once the new one is complete and on disk."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        os.chmod(temporary, 0o755)
        old = temporary.with_suffix(".old")
        handle = os.open(temporary, os.O_RDONLY)
        try:
            _hold(handle)
            yield temporary
            for inner in (*temporary.rglob("*"), temporary):
                _sync(inner)
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            os.close(handle)
            shutil.rmtree(temporary, ignore_errors=True)
            _settle(old, path)


def _settle(old: Path, path: Path) -> None:
    """Drop the folder `old` if what should replace it stands at `path`; else bring it back."""
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        os.replace(old, path)


def _hold(handle: int) -> None:
    """Lock this file or folder until the process ends, to show that it is being written."""
    with suppress(OSError):  # not every file system has locks: then nothing there is swept
        fcntl.flock(handle, fcntl.LOCK_EX)


def _held(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return path.exists()
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(handle)


def sweep_temporaries(folder: str | Path, name: str | None = None) -> None:
    """Tidy what killed processes left in `folder` of writing (to `name` in it, if given): drop
    `.NAME.*.tmp`, and bring `.NAME.*.old` back. What a running process is writing stays."""
    ours = re.compile(rf"\.({'.+' if name is None else re.escape(name)})\.\w{{8}}\.(old|tmp)")
    found = [match for path in Path(folder).glob(".*") if (match := ours.fullmatch(path.name))]
    for match in sorted(found, key=lambda match: match[2]):  # the old ones first
        left = Path(folder, match[0])
        if _held(left.with_suffix(".tmp")):
            continue
        if match[2] == "old":
            _settle(left, Path(folder, match[1]))
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_text(path: str | Path) -> str:
    """Read a file of UTF-8 text, or raise a VicugnaError."""
    try:
        with disk_errors(path):
            return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise VicugnaError(f"not UTF-8 text at byte {error.start}", str(path),
                           "Save the file as UTF-8") from error


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or malformed one is a VicugnaError naming the line."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise VicugnaError(f"not valid JSON: {error.msg} (line {error.lineno})", str(path),
                           "Correct the file") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of 5,000 digits
        raise VicugnaError(f"not valid JSON: {error}", str(path), "Correct the file") from error


def printable(text: str) -> str:
    """`text` with lone surrogates (bytes of file names that are not UTF-8) as escapes."""
    return text.encode(errors="backslashreplace").decode()


def canonical(value: Any) -> bytes:
    """The one byte form of a JSON value that digests are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False,
                      allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON value's canonical form."""
    return hashlib.sha256(canonical(value)).hexdigest()


def digest_file(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with disk_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def owned(folder: str | Path) -> Iterator[None]:
    """Hold `folder` for this process alone, by a lock that the system releases when it ends.
    VicugnaError when another process holds it."""
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 - held for the length of the block
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise VicugnaError("another process is using this folder", str(folder),
                               "Wait for it to end, or choose another folder") from error
        yield
