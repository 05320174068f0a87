"""Files that are never half-written, and folders that one process owns at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vicugna.errors import VicugnaError


def storage_error(error: OSError, path: str | Path) -> VicugnaError:
    """Turn an operating-system error about `path` into one that says what to do."""
    where = str(path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return VicugnaError("the disk is full", where, "Free some space and run the command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return VicugnaError("no permission to write or read here", where,
                            "Choose a folder you own, or change its permissions")
    if error.errno == errno.ENOENT:
        return VicugnaError("no such file or folder", where, "Check the path")
    if error.errno in (errno.ENOTDIR, errno.EISDIR):
        return VicugnaError("a file stands where a folder is needed, or the other way round",
                            where, "Check the path")
    return VicugnaError(error.strerror or str(error), where, "Check the path and the disk")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; when the block succeeds, fsync it and rename it over `path`.

    On any failure the temporary file is removed and `path` is as it was.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder; when the block succeeds, it takes the place of folder `path`.

    The old folder, if any, is removed only once the new one is complete and on disk.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        os.chmod(temporary, 0o755)
    except OSError as error:
        raise storage_error(error, path) from error
    old = temporary.with_suffix(".old")
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
            else:
                _sync_folder(file)
        _sync_folder(temporary)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists():
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(old, path)


def sweep_temporaries(folder: str | Path) -> None:
    """Tidy what a killed process left in `folder`: drop `.*.tmp`, and bring `.NAME.*.old` back."""
    for left in Path(folder).glob(".*.old"):
        original = left.parent / left.name[1:].rsplit(".", 2)[0]
        if original.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            os.replace(left, original)
    for left in Path(folder).glob(".*.tmp"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or malformed one is a VicugnaError naming the line."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise storage_error(error, path) from error
    except UnicodeDecodeError as error:
        raise VicugnaError(f"not UTF-8 text at byte {error.start}", str(path),
                           "Save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise VicugnaError(f"not valid JSON: {error.msg} (line {error.lineno})", str(path),
                           "Correct the file") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of 5,000 digits
        raise VicugnaError(f"not valid JSON: {error}", str(path), "Correct the file") from error


def canonical(value: Any) -> bytes:
    """The one byte form of a JSON value that digests are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False,
                      allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON value's canonical form."""
    return hashlib.sha256(canonical(value)).hexdigest()


def digest_file(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise storage_error(error, path) from error


@contextmanager
def owned(folder: str | Path) -> Iterator[None]:
    """Hold `folder` for this process alone, by a lock the system drops if the process dies.

    Raises VicugnaError when another process holds it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 - held for the length of the block
    except OSError as error:
        raise storage_error(error, folder) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise VicugnaError("another process is using this folder", str(folder),
                               "Wait for it to end, or choose another folder") from error
        yield
