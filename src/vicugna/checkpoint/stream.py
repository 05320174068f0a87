"""The tensors of a checkpoint on disk, and its digest, in the memory of a few of them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vicugna.checkpoint import state_dict
from vicugna.checkpoint.digest import digest
from vicugna.checkpoint.stored import Mapped
from vicugna.checkpoint.survey import Survey
from vicugna.files import disk_errors
from vicugna.progress import Report


def digest_stored(network: Any, found: Survey, report: Report) -> str | None:
    """The digest that a model loaded in the dtypes it is stored in has; None where its parameters
    have several, in which it cannot be loaded.

    `network` is of the survey's config and may be on the meta device; `report` is called with each
    tensor's number and name. VicugnaError where names or shapes do not fit and for values that
    are not finite.
    """
    parts, _ = state_dict.parts(network, found.stored, found.folder)
    buffers = dict(network.named_buffers())
    if len({part.kind for name, part in parts.items() if name not in buffers}) > 1:
        return None
    with disk_errors(found.folder):
        tensors = StoredTensors(network, found, None, report)
        return digest(tensors, network.config.to_dict(), found.tokenizer, found.generation_config)


class StoredTensors(Mapping[str, Tensor]):
    """What `Checkpoint.tensors` gives of a loaded network, whose parameters become `dtype` (None
    keeps what is stored); each is read when it is asked for."""

    def __init__(self, network: Any, found: Survey, dtype: torch.dtype | None,
                 report: Report = lambda done, name: None) -> None:
        parts, passthrough = state_dict.parts(network, found.stored, found.folder)
        buffers = dict(network.named_buffers())
        self._kinds = {name: buffers[name].dtype if name in buffers else dtype or part.kind
                       for name, part in parts.items()}
        self._kinds |= {name: part.kind for name, part in passthrough.items()}
        self._parts, self._report, self._done = parts | passthrough, report, 0
        # Experts that files hold stacked are named apart, as they are of a network.
        naming = state_dict.names_of(network)
        self._places = {name: (whole, n, len(names)) for whole, part in self._parts.items()
                        for names in [naming.of_experts(whole, part.shape[0] if part.shape else 0)
                                      or [whole]]
                        for n, name in enumerate(names)}

    def __getitem__(self, name: str) -> Tensor:
        whole, n, count = self._places[name]
        part = self._parts[whole]
        # One mapping for each, so that its pages go when the tensor does.
        tensor = Mapped().read([part], part.shape, self._kinds[whole], torch.device("cpu"))
        self._done += 1
        self._report(self._done, name)
        return tensor if count == 1 else tensor.reshape(count, -1, part.shape[-1])[n]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
