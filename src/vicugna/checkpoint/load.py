"""Load a checkpoint of any format, by whatever names it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from vicugna.checkpoint import foreign
from vicugna.checkpoint.checkpoint import Checkpoint, Origin
from vicugna.checkpoint.gguf import reader as gguf
from vicugna.checkpoint.hf import directory
from vicugna.checkpoint.meta import original as meta
from vicugna.checkpoint.source import locate
from vicugna.checkpoint.state_dict import PackedTensors, Parts, StoredTensors, place
from vicugna.checkpoint.stored import Mapped
from vicugna.checkpoint.survey import Survey
from vicugna.files import disk_errors

AT_ONCE = 2**28  # bytes of weights; looking at all values of more takes most of the time to load
# Per format: whether a path has it, and the reader. The first that recognises a path reads it.
READERS: tuple[tuple[Callable[[Path], object], Callable[[Path], Survey]], ...] = (
    (directory.recognises, directory.survey), (meta.find, meta.survey),
    (gguf.recognises, gguf.survey))


def survey(path: str | Path) -> Survey:
    """The facts of the checkpoint `path`: a folder (in the form of Hugging Face or of Meta, or with
    one GGUF file), a GGUF file, a Hub id `org/name[@revision]`, or the name of a packaged model.

    Of the weights only the headers are read, of which nothing is believed unchecked. Nothing is
    unpickled and no code of the checkpoint is run. Raises VicugnaError.
    """
    with disk_errors(path):
        found = locate(path)
        for recognises, read_facts in READERS:
            if recognises(found):
                return read_facts(found)
        raise foreign.explain(found)


Pack = Callable[[Parts, Mapped], set[str]]


def read(path: str | Path, dtype: torch.dtype | None = torch.float32,
         device: str | torch.device = "cpu", pack: Pack | None = None,
         weights: str | None = None) -> Checkpoint:
    """Read the checkpoint `path` (as `survey`).

    Parameters become `dtype`; None keeps what is stored. Buffers keep the network's own dtype.
    Weights stay a private mapping of their files where neither dtype nor device changes; NaN in
    large ones is reported when the network first runs, is saved or digested. On the device "meta"
    there are none: see Origin.

    `pack` puts matrices into the network in forms of its own before the others are read, and
    returns the names of those parameters; `weights` says in the digest into which format it
    quantised them, None if they are as the file has them. Raises VicugnaError.
    """
    found, device = survey(path), torch.device(device)
    parts, without_weights = Parts(found), device.type == "meta"
    large = sum(part.nbytes for part in found.stored.values()) > AT_ONCE
    mapped = Mapped(later=large or without_weights)
    with disk_errors(path):
        packing = Mapped()
        packed = pack(parts, packing) if pack else set[str]()
        if not without_weights:
            place(parts.network, dict(parts.values(dtype, device, mapped, packed)))
            parts.network.eval()
        passthrough = {name: mapped.read([part], part.shape, part.kind, torch.device("cpu"))
                       for name, part in parts.passthrough.items()}
    origin = Origin(found.config, found.tokenizer, found.files, passthrough)
    if packed:
        origin = replace(origin, stored=PackedTensors(parts, packed, packing,
                                                       weights is None),
                         weights=weights)
    if without_weights:
        origin = replace(origin, check=mapped.check, stream=partial(parts.streamed, dtype),
                         stored=StoredTensors(parts, dtype))
    elif mapped.unchecked:  # else the mappings of converted tensors may go
        origin = replace(origin, check=mapped.check)
        _check_first_run(parts.network, mapped)
    return Checkpoint(parts.network, found.tokenizer, found.generation_config, origin)


def _check_first_run(network: nn.Module, mapped: Mapped) -> None:
    def first_run(*_: object) -> None:
        mapped.check()
        hook.remove()

    hook = network.register_forward_pre_hook(first_run)
