"""From one format of a checkpoint to another, tensor by tensor; losses must be allowed."""

import os
from pathlib import Path
from typing import Any

from vicugna.checkpoint.conversion import Conversion
from vicugna.checkpoint.foreign import start
from vicugna.checkpoint.gguf import writer
from vicugna.checkpoint.gguf.file import KINDS, MAGIC
from vicugna.checkpoint.hf import directory
from vicugna.checkpoint.load import survey
from vicugna.checkpoint.state_dict import Parts
from vicugna.dtypes import DTYPES
from vicugna.errors import VicugnaError
from vicugna.files import disk_errors, replacing, sweep_temporaries
from vicugna.progress import bar

FORMS = ("hf", "gguf")


def convert(source: str | Path, target: str | Path, form: str | None = None,
            dtype: str | None = None, lossy: bool = False, progress: bool = False
            ) -> dict[str, Any]:
    """Write the checkpoint `source` (anything `read` reads) to `target` in another format or dtype.

    `form` is "hf" or "gguf", by default what `target` looks like; `dtype` is a float type, or for
    GGUF "q8_0" or "q4_0", by default as stored. With `progress`, people see a bar. Memory holds one
    tensor of the target besides the mapped one of the source.
    Returns what was done. Refused where something would be lost without `lossy`; VicugnaError.
    """
    target = Path(os.path.expanduser(target))
    form = form or ("gguf" if target.suffix.lower() == ".gguf" else "hf")
    if form not in FORMS:
        raise VicugnaError(f"unknown format {form!r}", "--to", f"Use one of {', '.join(FORMS)}")
    known = [*KINDS] if form == "gguf" else [*DTYPES]
    if dtype not in (None, *known):
        raise VicugnaError(f"{dtype!r} is not a dtype of {form} files", "--dtype",
                           f"Use one of {', '.join(known)}")
    found = survey(source)
    _check_target(found.folder, target, form)
    parts, conversion = Parts(found), Conversion(str(source), lossy)
    tensors = parts.by_name
    if form == "gguf":
        writer.note_losses(conversion, found.config, dtype, len(parts.passthrough))
        found, tensors = writer.text_part(found, tensors)
    else:
        tensors |= parts.passthrough
    with bar("convert", len(tensors), progress) as conversion.report:
        if form == "gguf":
            sweep_temporaries(target.parent, target.name)
            with disk_errors(target), replacing(target) as temporary:
                writer.write(temporary, found, tensors, dtype, conversion)
        else:
            directory.write(target, {
                name: conversion.to(stored, DTYPES.get(dtype or "", stored.kind))
                for name, stored in tensors.items()}, found.config, found.generation_config,
                found.tokenizer, found.files)
    return {"source": str(source), "target": str(target), "form": form, "dtype": dtype or "as "
            "stored", "tensors": len(tensors), "lost": conversion.summary()}


def _check_target(source: Path, target: Path, form: str) -> None:
    """Raise VicugnaError for a target that holds something else, or what is read. A new file or
    folder in the source's folder is fine."""
    with disk_errors(target):
        if ((target.exists() and target.samefile(source))
                or (form == "hf" and target.resolve() in source.resolve().parents)):
            raise VicugnaError("it would replace the checkpoint that is read", str(target),
                               "Choose another place")
        if form == "gguf" and target.is_dir():
            raise VicugnaError("a folder stands where the file should be", str(target),
                               "Name a file in it, such as model.gguf")
        if form == "gguf" and target.exists() and not (
                target.is_file() and start(target) == MAGIC):
            raise VicugnaError("there is a file of another kind, which would be lost", str(target),
                               "Choose another name")
