"""The tensors of a conversion, read one at a time, and what is lost of them."""

import math
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from vicugna.checkpoint.stored import Mapped, Stored
from vicugna.dtypes import name_of
from vicugna.errors import Refused, VicugnaError
from vicugna.progress import Report

BLOCK = 2**20  # values that are cast and compared at once


class Conversion:
    """A conversion of the checkpoint `where`, which loses nothing, or if that is `allowed`, what
    `summary` says. `report` is called with each tensor's number and name."""

    report: Report

    def __init__(self, where: str, allowed: bool) -> None:
        self.where, self.allowed = where, allowed
        self.notes: list[str] = []
        self.rounded: dict[torch.dtype, Counter[str]] = {}  # how many values of which tensors
        self._mapped, self._number = Mapped(), 0
        self.drop_pages = self._mapped.drop_pages
        self._last: tuple[Stored | None, Tensor] = None, torch.empty(0)

    def read(self, stored: Stored) -> Tensor:
        """A tensor as it is stored, valid until another one is read."""
        if self._last[0] is not stored:
            self.drop_pages(self._last[1])
            self._last = None, torch.empty(0)  # before there is memory for the next
            self._number += 1
            self.report(self._number, stored.name)
            dtype = torch.float32 if stored.scale is not None else stored.dtype
            self._last = stored, self._mapped.read([stored], stored.shape, dtype,
                                                   torch.device("cpu"))
        return self._last[1]

    def to(self, stored: Stored, dtype: torch.dtype) -> Stored:
        """A tensor of the checkpoint that will be cast to `dtype` when it is read."""
        return replace(stored, dtype=dtype, scale=None,
                       load=lambda: self.cast(self.read(stored), dtype, stored.name))

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
