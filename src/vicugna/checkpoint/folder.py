"""Files in a checkpoint's folder, out of which no name and no link leads."""

import os
from pathlib import Path, PurePosixPath
from typing import Any

from vicugna.checkpoint.foreign import check_pointer
from vicugna.checkpoint.stored import broken
from vicugna.errors import VicugnaError
from vicugna.files import canonical, read_json

JSON_BYTES = 10**6


def inside(folder: Path, name: str) -> Path:
    """`folder/name`, which must not lead out of the folder, by its name or by a symbolic link."""
    # Links in a circle are left unresolved: such a path is no file.
    root, target = (Path(os.path.realpath(path)) for path in (folder, folder / name))
    roots = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        roots.append(root.parent.parent / "blobs")  # where the Hub's cache keeps the files
    if (".." in PurePosixPath(name).parts or name.startswith("/")
            or not any(map(target.is_relative_to, roots))):
        raise VicugnaError(f"{name!r} leads out of the folder", str(folder),
                           "Put the file itself there, if you trust where it comes from")
    if not target.is_file():  # a pipe would hang
        raise broken("no such file, or not a regular one", folder / name)
    check_pointer(target)
    return folder / name


def read_object(folder: Path, name: str, limit: int = JSON_BYTES) -> dict[str, Any]:
    """The JSON object in the regular file `folder/name`, of at most `limit` bytes. VicugnaError for
    any other file, one that a link leads to out of the folder, and values outside JSON."""
    path = inside(folder, name)
    if path.stat().st_size > limit:
        raise broken(f"over {limit:,} bytes", path)
    value = read_json(path)
    if not isinstance(value, dict):
        raise broken("not a JSON object", path)
    try:
        canonical(value)
    except ValueError as error:  # NaN, infinity, half of a surrogate pair: no JSON has them
        raise broken(f"holds a value outside JSON: {error}", path) from error
    return value
