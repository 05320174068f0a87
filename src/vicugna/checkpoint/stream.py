"""The tensors of a checkpoint on disk, and its digest, in the memory of a few of them."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vicugna.checkpoint.digest import digest
from vicugna.checkpoint.state_dict import Parts, names_of
from vicugna.checkpoint.stored import Mapped, Stored
from vicugna.checkpoint.survey import Survey
from vicugna.files import disk_errors
from vicugna.progress import Report


def digest_stored(parts: Parts, found: Survey, report: Report) -> str | None:
    """The digest that a model loaded in the dtypes it is stored in has; None where its parameters
    have several, in which it cannot be loaded.

    `parts` are those of the survey, `report` is called with each tensor's number and name.
    VicugnaError for values that are not finite.
    """
    if len(parts.kinds) > 1:
        return None
    with disk_errors(found.folder):
        return digest(StoredTensors(parts, None, report), parts.network.config.to_dict(),
                      found.tokenizer, found.generation_config)


class StoredTensors(Mapping[str, Tensor]):
    """What `Checkpoint.tensors` gives of a loaded network, whose parameters become `dtype` (None
    keeps what is stored); each is read when it is asked for."""

    def __init__(self, parts: Parts, dtype: torch.dtype | None,
                 report: Report = lambda done, name: None) -> None:
        self._report, self._done = report, 0
        # Each name's tensor and dtype; where that is a stack of experts, which one of how many.
        self._places: dict[str, tuple[Stored, torch.dtype, int, int]] = {}
        naming = names_of(parts.network)
        for name, part in parts.by_name.items():
            buffer = parts.buffers.get(name)
            kind = dtype or part.kind if buffer is None else buffer.dtype
            ones = naming.of_experts(name, part.shape[0] if part.shape else 0) or [name]
            self._places |= {one: (part, kind, n, len(ones)) for n, one in enumerate(ones)}
        self._places |= {name: (part, part.kind, 0, 1) for name, part in parts.passthrough.items()}

    def __getitem__(self, name: str) -> Tensor:
        part, kind, n, count = self._places[name]
        # One mapping for each, so that its pages go when the tensor does.
        tensor = Mapped().read([part], part.shape, kind, torch.device("cpu"))
        self._done += 1
        self._report(self._done, name)
        return tensor if count == 1 else tensor.reshape(count, -1, part.shape[-1])[n]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
