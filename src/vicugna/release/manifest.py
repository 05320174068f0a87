"""The manifest of a release: every file's hash, and the digests that bind scores to weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vicugna.errors import VicugnaError
from vicugna.files import digest_file, digest_of, read_json
from vicugna.release.contents import Contents

NAME = "manifest.json"


def manifest(release: Contents) -> dict[str, Any]:
    """What manifest.json must say of a release.

    The release digest covers weights, scores and recipe, but no times or costs, so that a run
    which was killed and continued gives the same one.
    """
    what = {"model_digest": release.model.digest, "results_digests": release.results_digests,
            "recipe_digest": release.recipe_digest}
    return {"format": 1, **what, "release_digest": digest_of(what),
            "files": files_in(release.folder)}


def files_in(folder: Path) -> dict[str, dict[str, Any]]:
    """sha256 and size of every file of a release but the manifest, by its path within it.

    A link is a VicugnaError: what it leads to is not in the release.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise VicugnaError("neither file nor folder", str(path), "Put the file itself there")
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != NAME:
            found[name] = {"sha256": digest_file(path), "size": path.stat().st_size}
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read manifest.json; VicugnaError if it is not one."""
    content = read_json(folder / NAME)
    if not isinstance(content, dict) or content.get("format") != 1 or "files" not in content:
        raise VicugnaError("not a release's manifest of this version", str(folder / NAME),
                           "Check that this folder is a release")
    return content
