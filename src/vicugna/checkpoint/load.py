"""From what the user names to a checkpoint in memory, whatever its form."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from vicugna.checkpoint import state_dict
from vicugna.checkpoint.checkpoint import Checkpoint, Origin
from vicugna.checkpoint.gguf import reader as gguf
from vicugna.checkpoint.hf import directory
from vicugna.checkpoint.meta import original as meta
from vicugna.checkpoint.survey import Survey
from vicugna.errors import VicugnaError
from vicugna.files import disk_errors

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
HUB_ERRORS = {
    "GatedRepoError": ("the Hub asks for an approved account", "Ask there, then: hf auth login"),
    "RepositoryNotFoundError": ("no such folder, and no such model on the Hub", "Check the name"),
    "RevisionNotFoundError": ("the Hub has no such revision of it", "Check the revision")}


# Whether a path is of that form, and what it says of itself; the first that knows it reads it.
READERS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Survey]], ...] = (
    (gguf.recognises, gguf.survey), (meta.recognises, meta.survey),
    (directory.recognises, directory.survey))


def survey(path: str | Path) -> Survey:
    """The facts of the checkpoint in folder `path` (in the form of Hugging Face or of Meta) or file
    `path` (GGUF), or named by Hub id `org/name[@revision]`.

    Of the weights only the headers are read, of which nothing is believed unchecked. Nothing is
    unpickled and no code of the checkpoint is run. Raises VicugnaError.
    """
    with disk_errors(path):
        folder = _locate(path)
        return next(survey for recognises, survey in READERS if recognises(folder))(folder)


def read(path: str | Path, dtype: torch.dtype | None = torch.float32,
         device: str | torch.device = "cpu") -> Checkpoint:
    """Read the checkpoint in folder `path`, or named by Hub id `org/name[@revision]`.

    Parameters become `dtype`; None keeps what is stored. Buffers keep the network's own dtype.
    Weights stay a private mapping of their files where neither dtype nor device changes; NaN in
    large ones is reported when the network first runs. Raises VicugnaError.
    """
    found = survey(path)
    with disk_errors(path):
        network = state_dict.build(found.config, found.stored, str(found.source))
        passthrough, check = state_dict.fill(network, found.stored, dtype, torch.device(device),
                                             found.folder)
    origin = Origin(found.config, found.tokenizer, found.files, passthrough, check)
    return Checkpoint(network, found.tokenizer, found.generation_config, origin)


def _locate(path: str | Path) -> Path:
    """The local folder of a checkpoint: `path` itself, or a Hub snapshot of the id it names."""
    folder = Path(os.path.expanduser(path))
    if folder.is_dir() or (gguf.recognises(folder)):
        return folder
    if folder.exists():
        raise directory.refusal(folder) if folder.suffix in directory.PICKLES else VicugnaError(
            "a file, not a folder", str(path), "Name the folder which holds config.json")
    return download(str(path))


def download(hub_id: str, every_file: bool = False) -> Path:
    """The local snapshot of the Hub's repository `org/name[@revision]`: of its files those that
    are loaded, or all; of what the cache has if the Hub cannot be reached. Raises VicugnaError."""
    from huggingface_hub import snapshot_download
    if not (found := HUB_ID.fullmatch(hub_id)):
        raise VicugnaError("no such folder", hub_id, "Check the path, or name a Hub id: org/name")
    try:
        return Path(snapshot_download(found[1], revision=found[2],
                                      allow_patterns=None if every_file else HUB_FILES,
                                      ignore_patterns=None if every_file else "*/*"))
    except (OSError, RuntimeError, ValueError) as error:  # no network, offline mode, HTTP errors
        what, fix = HUB_ERRORS.get(type(error).__name__, (
            "no such folder, and the Hub could not be reached",
            "Check the path, or connect to the network and try again"))
        raise VicugnaError(what, hub_id, fix) from error
