"""A checkpoint in memory: a network, its tokenizer, and what came with them."""

import copy
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

from torch import Tensor, nn

from vicugna.checkpoint.digest import digest
from vicugna.checkpoint.hf import directory
from vicugna.checkpoint.state_dict import named_tensors
from vicugna.checkpoint.stored import Blocks, Stored
from vicugna.checkpoint.survey import default_generation_config
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer


@dataclass(frozen=True)
class Origin:
    """What came with a network, and goes with it where it is saved.

    `config` is config.json as it was read, `files` the contents of the files of `tokenizer`,
    `passthrough` the tensors that the network does not compute with, by name. `check` raises
    VicugnaError for values that are not finite in weights that were not checked yet.

    Of a network read onto the meta device, `stream` gives the parameters and buffers one by one,
    and `stored` all tensors by their names in files, each read when it is asked for. Of a network
    whose matrices are packed, `stored` gives what those were made of, and `weights` the format into
    which they were quantised, None for those that are as the file has them.
    """

    config: dict[str, Any]
    tokenizer: Tokenizer | None
    files: dict[str, bytes]
    passthrough: dict[str, Tensor]
    check: Callable[[], None] = lambda: None
    stream: Callable[[], Iterator[tuple[str, Tensor]]] | None = None
    stored: Mapping[str, Tensor | Blocks] = field(default_factory=dict)
    weights: str | None = None


class Checkpoint:
    """A network with its tokenizer, if any, and generation_config.json, by default made from the
    tokenizer. `origin` is None for a network that was not read from a checkpoint."""

    def __init__(self, network: nn.Module, tokenizer: Tokenizer | None = None,
                 generation_config: dict[str, Any] | None = None,
                 origin: Origin | None = None) -> None:
        self.network: Any = network
        self.tokenizer = tokenizer
        self.generation_config = (default_generation_config(tokenizer)
                                  if generation_config is None else generation_config)
        self.origin = origin
        self._digest: tuple[Any, str] | None = None

    @property
    def config(self) -> Any:
        """The network's frozen Config; its fields are the keys of config.json."""
        return self.network.config

    def tensors(self) -> Mapping[str, Tensor | Blocks]:
        """All that was loaded, by its names in a checkpoint's files and without copies.
        VicugnaError for values that are not finite, in weights that were not checked yet."""
        if self.origin is None:
            return named_tensors(self.network)
        if next(self.network.parameters()).is_meta:
            return self.origin.stored
        self.origin.check()
        held: Any = named_tensors(self.network) | self.origin.passthrough
        return ChainMap(held, cast(Any, self.origin.stored)) if self._is_packed else held

    @property
    def _is_packed(self) -> bool:
        """Whether matrices are packed: a network that was read onto the meta device has `stored`
        too, even once training has filled it."""
        return bool(self.origin and self.origin.stored and not self.origin.stream)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what is loaded (see digest.py), computed on first use, and again once
        something was replaced or a weight was trained."""
        tensors = self.tensors()
        more = self.tokenizer, dict(self.generation_config)
        held = [*self.network.state_dict().values(),
                *(self.origin.passthrough.values() if self.origin else ())]
        state = [(tensor.data_ptr(), tensor._version) for tensor in held], more
        if self._digest is None or self._digest[0] != state:
            self._digest = state, digest(tensors, self.config.to_dict(), *more,
                                         self.origin.weights if self.origin else None)
        return self._digest[1]

    def with_network(self, network: nn.Module) -> Self:
        """The same with another network of the same config, such as a trained one."""
        other = copy.copy(self)
        other.network, other._digest = network, None
        return other

    def save(self, folder: str | Path, tensors: Mapping[str, Tensor | Stored] | None = None
             ) -> None:
        """Write a Hugging Face directory, whole or not at all; loading it gives this digest.

        `tensors`, by their names in files, stand for those of a network that is not in memory.
        config.json keeps the keys of the original that are not modelled here, and the tokenizer's
        files stay as they were. Raises VicugnaError, also for a folder which holds anything that
        is not of a checkpoint, and for a network whose matrices are packed.
        """
        origin = self.origin
        if tensors is None:
            found = self.tensors()
            if self._is_packed:
                raise VicugnaError("its matrices are packed for inference", str(folder),
                                   "Load it with weights='float', or convert its file")
            tensors = cast(Mapping[str, Tensor], found)
        config, files = self.config.to_dict(), {}
        if origin is None:
            config |= {key: self.generation_config[key] for key in directory.TOKEN_IDS
                       if key in self.generation_config}
        else:
            before = type(self.config).from_dict(origin.config).to_dict()
            config = directory.updated(origin.config, before, config)
            files = origin.files if self.tokenizer is origin.tokenizer else {}
        directory.write(folder, tensors, config, self.generation_config, self.tokenizer, files)
