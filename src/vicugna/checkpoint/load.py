"""Load a checkpoint of any format, by whatever names it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from vicugna.checkpoint import foreign, state_dict
from vicugna.checkpoint.checkpoint import Checkpoint, Origin
from vicugna.checkpoint.gguf import reader as gguf
from vicugna.checkpoint.hf import directory
from vicugna.checkpoint.meta import original as meta
from vicugna.checkpoint.source import locate
from vicugna.checkpoint.stored import Mapped
from vicugna.checkpoint.stream import StoredTensors
from vicugna.checkpoint.survey import Survey
from vicugna.files import disk_errors

# Per format: whether a path has it, and the reader. The first that recognises a path reads it.
READERS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Survey]], ...] = (
    (directory.recognises, directory.survey), (meta.recognises, meta.survey),
    (gguf.recognises, gguf.survey))


def survey(path: str | Path) -> Survey:
    """The facts of the checkpoint `path`: a folder (in the form of Hugging Face or of Meta, or with
    one GGUF file), a GGUF file, a Hub id `org/name[@revision]`, or the name of a packaged model.

    Of the weights only the headers are read, of which nothing is believed unchecked. Nothing is
    unpickled and no code of the checkpoint is run. Raises VicugnaError.
    """
    with disk_errors(path):
        place = locate(path)
        for recognises, read_facts in READERS:
            if recognises(place):
                return read_facts(place)
        raise foreign.explain(place)


def read(path: str | Path, dtype: torch.dtype | None = torch.float32,
         device: str | torch.device = "cpu") -> Checkpoint:
    """Read the checkpoint `path` (as `survey`).

    Parameters become `dtype`; None keeps what is stored. Buffers keep the network's own dtype.
    Weights stay a private mapping of their files where neither dtype nor device changes; NaN in
    large ones is reported when the network first runs. On the device "meta" there are none: see
    Origin. Raises VicugnaError.
    """
    found = survey(path)
    with disk_errors(path):
        network = state_dict.build(found.config, found.stored, str(found.source))
        if torch.device(device).type == "meta":
            return _without_weights(network, found, dtype)
        passthrough, check = state_dict.fill(network, found.stored, dtype, torch.device(device),
                                             found.folder)
    origin = Origin(found.config, found.tokenizer, found.files, passthrough, check)
    return Checkpoint(network, found.tokenizer, found.generation_config, origin)


def _without_weights(network: nn.Module, found: Survey, dtype: torch.dtype | None) -> Checkpoint:
    _, extra = state_dict.parts(network, found.stored, found.folder)
    mapped = Mapped(later=True)
    passthrough = {name: mapped.read([part], part.shape, part.kind, torch.device("cpu"))
                   for name, part in extra.items()}
    origin = Origin(found.config, found.tokenizer, found.files, passthrough, mapped.check,
                    partial(state_dict.streamed, network, found.stored, dtype, found.folder),
                    StoredTensors(network, found, dtype))
    return Checkpoint(network, found.tokenizer, found.generation_config, origin)
