"""From one format of a checkpoint to another, tensor by tensor; losses must be allowed."""

import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vicugna.checkpoint import load as loading
from vicugna.checkpoint import state_dict
from vicugna.checkpoint.foreign import start
from vicugna.checkpoint.gguf import keys, writer
from vicugna.checkpoint.gguf.file import KINDS, MAGIC
from vicugna.checkpoint.hf import directory
from vicugna.checkpoint.stored import Mapped, Stored
from vicugna.dtypes import DTYPES, name_of
from vicugna.errors import Refused, VicugnaError
from vicugna.files import disk_errors, replacing, sweep_temporaries
from vicugna.progress import Report

FORMS = ("hf", "gguf")
BLOCK = 2**20  # values that are cast and compared at once


class Losses:
    """What a conversion loses: nothing, or where that is allowed, what `notes` lists. `drop_pages`
    is called with rows that are no longer needed."""

    def __init__(self, allowed: bool, where: str, drop_pages: Callable[[Tensor], None]) -> None:
        self.allowed, self.where, self.drop_pages = allowed, where, drop_pages
        self.notes: list[str] = []
        self.rounded: dict[torch.dtype, Counter[str]] = {}  # how many values of which tensors

    def note(self, what: str) -> None:
        """Something is lost: Refused unless that is allowed."""
        if not self.allowed:
            raise Refused(f"not converted, since it would lose {what}", self.where,
                          "Allow it with --lossy")
        self.notes.append(what)

    def cast(self, tensor: Tensor, dtype: torch.dtype, name: str, part: str = "") -> Tensor:
        """The tensor, or this part of it, as `dtype`; values that it cannot hold exactly are a
        loss, those that are too large for it a VicugnaError."""
        if tensor.dtype == dtype or not tensor.numel():
            return tensor.to(dtype)
        cast, changed, most = torch.empty(tensor.shape, dtype=dtype), 0, 0.0
        wide = torch.promote_types(tensor.dtype, dtype)
        for new, old in zip(cast.view(-1).split(BLOCK), tensor.reshape(-1).split(BLOCK),
                            strict=True):
            new.copy_(old)
            if wide != dtype:  # which does not hold every value
                error = new.to(wide, copy=True).sub_(old)
                changed += int(error.count_nonzero())
                most = max(most, float(error.abs_().max()))
            self.drop_pages(old)
        if changed:
            kind = name_of(dtype)
            if not math.isfinite(most):
                raise VicugnaError(f"tensor {name}{part} has values that are too large for {kind}",
                                   self.where, "Choose bfloat16 or float32")
            if not self.allowed:
                self.note(f"precision: as {kind}, {changed:,} of {tensor.numel():,} values of "
                          f"{name}{part} would change, by up to {most:.1e}")
            self.rounded.setdefault(dtype, Counter())[name] += changed
        return cast

    def summary(self) -> list[str]:
        """What was lost, a line for each kind of loss."""
        return self.notes + [f"precision: {changed.total():,} values of {len(changed):,} tensors "
                             f"rounded to {name_of(dtype)}"
                             for dtype, changed in self.rounded.items()]


def convert(source: str | Path, target: str | Path, form: str | None = None,
            dtype: str | None = None, lossy: bool = False,
            report: Callable[[int], Report] | None = None) -> dict[str, Any]:
    """Write the checkpoint `source` (anything `read` reads) to `target` in another format or dtype.

    `form` is "hf" or "gguf", by default what `target` looks like; `dtype` is a float type, or for
    GGUF "q8_0" or "q4_0", by default as stored. `report(tensors)` gives what is called with each
    tensor's number and name. Memory holds one tensor of the target besides the mapped one of the
    source.
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
    found = loading.survey(source)
    _check_target(found.folder, target, form)
    mapped = Mapped()
    losses = Losses(lossy, str(source), mapped.drop_pages)
    loaded = state_dict.Parts(state_dict.build(found), found)
    parts, passthrough = loaded.by_name, loaded.passthrough
    if form == "gguf":
        _note_known(losses, found.config, dtype, len(passthrough))
        found, parts = writer.text_part(found, parts)
    wanted = parts | ({} if form == "gguf" else passthrough)
    total, number, last = len(wanted), 0, torch.empty(0)
    progress = report(total) if report else lambda done, name: None

    def read(stored: Stored) -> Tensor:
        nonlocal last, number
        mapped.drop_pages(last)
        last = torch.empty(0)
        progress(number := number + 1, stored.name)
        wide = torch.float32 if stored.scale is not None else stored.dtype
        last = mapped.read([stored], stored.shape, wide, torch.device("cpu"))
        return last

    def load(stored: Stored, dtype: torch.dtype) -> Tensor:
        return losses.cast(read(stored), dtype, stored.name)

    if form == "gguf":
        sweep_temporaries(target.parent, target.name)
        with disk_errors(target), replacing(target) as temporary:
            writer.write(temporary, found, wanted, dtype, read, losses.cast, mapped.drop_pages)
    else:
        tensors = {name: replace(stored, dtype=kind, scale=None, load=partial(load, stored, kind))
                   for name, stored in wanted.items()
                   for kind in [DTYPES.get(dtype or "", stored.kind)]}
        directory.write_tensors(target, found, tensors)
    return {"source": str(source), "target": str(target), "form": form, "dtype": dtype or "as "
            "stored", "tensors": total, "lost": losses.summary()}


def _note_known(losses: Losses, config: dict[str, Any], dtype: str | None, passthrough: int
                ) -> None:
    """Note what is lost in GGUF whatever the values are."""
    for what in keys.lost(config):
        losses.note(what)
    if passthrough:
        losses.note(f"{passthrough:,} tensors that the model does not compute with")
    if dtype in ("q8_0", "q4_0"):
        losses.note(f"precision: {dtype} rounds the weights in blocks of 32")


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
