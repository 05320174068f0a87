"""Between a checkpoint's tensors and a network's state dict.

A network may stack in one parameter what files hold apart (a mixture's experts), and files may hold
tensors that it does not compute with, which are passed through. See checkpoint/names.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vicugna import models
from vicugna.checkpoint import names
from vicugna.checkpoint.names import Names
from vicugna.checkpoint.stored import Blocks, Mapped, Stored, broken, short
from vicugna.checkpoint.survey import Survey
from vicugna.errors import VicugnaError
from vicugna.files import disk_errors

LAYERS, EXPERTS = 400, 2**16  # more would only take time, or memory


def build(found: Survey) -> nn.Module:
    """The network that config.json describes, without memory for its weights yet.
    VicugnaError for a config that fits no network, or one far larger than what is stored."""
    config, stored, where = found.config, found.stored, str(found.source)
    rows = max((tensor.shape[0] for tensor in stored.values() if tensor.shape), default=0)
    limits = {"num_hidden_layers": min(LAYERS, len(stored) // 4)} | dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts"), min(EXPERTS, rows))
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key, limit in limits.items():
            if isinstance(number := part.get(key), int) and number > limit:
                raise broken(f"{key} is {number:,}, but the weights are only {len(stored):,} "
                             f"tensors of at most {rows:,} rows", where)
    try:
        kind = config.get("model_type")
        module = models.architecture(kind)
        chosen = module.Config.from_dict(names.of(kind).normalise(config, stored))
        with torch.device("meta"):
            return module.Network(chosen)
    except VicugnaError as error:
        raise VicugnaError(error.what, where, error.fix) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise broken(f"no network can be built from it: {reason}", where) from error


class Parts:
    """The stored tensors that make up the `network` of a checkpoint, which is on the meta device:
    `made_of` has them for each parameter and buffer, in order, and `passthrough` those that it does
    not compute with. VicugnaError as `build`, and where names or shapes do not fit."""

    def __init__(self, found: Survey) -> None:
        self.network: Any = build(found)
        network = self.network
        self.folder, self.tied = found.folder, ties(network)
        self.state, self.buffers = network.state_dict(), dict(network.named_buffers())
        naming = names_of(network)
        self.passthrough = {name: tensor for name, tensor in found.stored.items()
                            if naming.passthrough(name, network.config)}
        # A tied head may be stored too, and (before transformers 4.31) RoPE's frequencies.
        stored = {name: tensor for name, tensor in found.stored.items()
                  if name not in self.passthrough and not name.endswith("rotary_emb.inv_freq")}
        for name, other in self.tied.items():  # safetensors' save_model keeps the head of the two
            if name in stored and other not in stored:
                stored[other] = stored.pop(name).renamed(other)
        wanted: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.state.items():
            if name in stored or name not in self.tied:
                # The names of more experts than there are tensors would only fill memory.
                whole = name in stored or (tensor.dim() > 2 and len(tensor) > len(stored))
                wanted[name] = {name: tensor} if whole else split(naming, name, tensor)
        _compare({one: tuple(view.shape) for views in wanted.values()
                  for one, view in views.items()}, stored, self.folder)
        self.made_of = {name: [stored[one] for one in views] for name, views in wanted.items()}

    @property
    def by_name(self) -> dict[str, Stored]:
        """The tensors that the network is made of (of tied ones one), by their names in files."""
        return {part.name: part for name, those in self.made_of.items() if name not in self.tied
                for part in those}

    @property
    def kinds(self) -> set[torch.dtype]:
        """The dtypes that stand for those in which the parameters are stored."""
        return self.kinds_of(self.made_of.keys())

    def kinds_of(self, names: Collection[str]) -> set[torch.dtype]:
        """Those of the parameters among `names`."""
        return {part.kind for name in names if name not in self.buffers
                for part in self.made_of[name]}

    def values(self, dtype: torch.dtype | None, device: torch.device, mapped: Mapped,
               without: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """The network's parameters (of tied ones one) and buffers by name, each read by `mapped`
        when its turn comes, in the order of the disk; not those named in `without`.

        Parameters become `dtype`; None keeps what is stored. VicugnaError where they are stored in
        several, and for values that are not finite.
        """
        names = self.made_of.keys() - without
        if dtype is None and len(kinds := self.kinds_of(names)) > 1:
            raise VicugnaError("its weights are stored as "
                               f"{' and '.join(sorted(map(str, kinds)))}", str(self.folder),
                               "Load it as one of them: dtype='float32' or 'bfloat16'")

        def read(name: str) -> Tensor:
            made_of, like = self.made_of[name], self.state[name]
            kind = like.dtype if name in self.buffers else dtype or made_of[0].kind
            return mapped.read(made_of, like.shape, kind, device)

        for name in self.in_order(names):
            if name not in self.tied:
                yield name, read(name)
            elif not torch.equal(read(name), read(self.tied[name])):
                raise VicugnaError(f"{name} differs from the embeddings, but the config ties them",
                                   str(self.folder), "Set tie_word_embeddings to false in it")

    def in_order(self, names: Collection[str]) -> list[str]:
        """These parameters and buffers in the order of the disk."""
        return sorted(names, key=lambda name: (self.made_of[name][0].file,
                                               self.made_of[name][0].begin, name))

    def streamed(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """`values` on the CPU, each of which is valid until the next one is asked for."""
        mapped = Mapped()
        with disk_errors(self.folder):
            for name, tensor in self.values(dtype, torch.device("cpu"), mapped):
                yield name, tensor
                mapped.drop_pages(tensor)


class StoredTensors(Mapping[str, Tensor]):
    """What `Checkpoint.tensors` gives of a loaded network, whose parameters become `dtype` (None
    keeps what is stored); each is read when it is asked for."""

    def __init__(self, parts: Parts, dtype: torch.dtype | None) -> None:
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
        return tensor if count == 1 else tensor.reshape(count, -1, part.shape[-1])[n]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class PackedTensors(Mapping[str, Tensor | Blocks]):
    """What packed parameters were made of, by the names in files: read again by `mapped`, which has
    the files open, when it is asked for; the file's blocks, or `as_blocks` being false floats."""

    def __init__(self, parts: Parts, packed: set[str], mapped: Mapped, as_blocks: bool) -> None:
        self._parts = {part.name: part for name in packed for part in parts.made_of[name]}
        self._mapped, self._as_blocks = mapped, as_blocks

    def __getitem__(self, name: str) -> Tensor | Blocks:
        part, mapped = self._parts[name], self._mapped
        if self._as_blocks:
            with mapped.blocks(part) as found:
                return replace(found, rows=found.rows.clone())
        tensor = mapped.read([part], part.shape, part.kind, torch.device("cpu"))
        copy = tensor.clone()
        mapped.drop_pages(tensor)
        return copy

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def place(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let `tensors` be the parameters and buffers of a network; tied ones stay tied."""
    modules, parameters = dict(network.named_modules()), dict(network.named_parameters())
    tied = ties(network)
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        setattr(modules[owner], last, nn.Parameter(tensor, parameters[name].requires_grad)
                if name in parameters else tensor)
    for name, other in tied.items():
        owner, _, last = name.rpartition(".")
        setattr(modules[owner], last, network.get_parameter(other))


def named_tensors(network: Any) -> dict[str, Tensor]:
    """The network's parameters (tied ones once, experts apart) and buffers, by
    their names in a checkpoint's files and without copies."""
    tied, naming = ties(network), names_of(network)
    return {part: view for name, tensor in network.state_dict().items() if name not in tied
            for part, view in split(naming, name, tensor).items()}


def split(naming: Names, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors that files hold of a parameter, by name: of a stack each expert's."""
    parts = naming.of_experts(name, len(tensor) if tensor.dim() else 0)
    return dict(zip(parts, tensor.reshape(len(parts), -1, tensor.shape[-1]), strict=True)
                ) if parts else {name: tensor}


def names_of(network: Any) -> Names:
    """The names of the network's architecture."""
    return names.of(network.config.to_dict()["model_type"])


def ties(network: nn.Module) -> dict[str, str]:
    """Names of parameters that are only another name of an earlier one, and that one's."""
    first: dict[int, str] = {}
    every = network.named_parameters(remove_duplicate=False)
    return {name: other for name, parameter in every
            if (other := first.setdefault(id(parameter), name)) != name}


def _compare(wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored],
             where: str | Path) -> None:
    """Raise VicugnaError unless names and shapes of the weights are those of the network."""
    shapes = [f"{name} is {list(stored[name].shape)} instead of {list(wanted[name])}"
              for name in sorted(wanted.keys() & stored.keys())
              if stored[name].shape != wanted[name]]
    missing = sorted(wanted.keys() - stored.keys())
    unexpected = sorted(map(short, stored.keys() - wanted.keys()))
    faults = [f"{kind} {', '.join(names[:3])}" + f" and {len(names) - 3:,} more" * (len(names) > 3)
              for kind, names in (("missing", missing), ("unexpected", unexpected),
                                  ("wrong shape:", shapes)) if names]
    for more, fewer, fix in ((unexpected, missing, "take {!r} off"),
                             (missing, unexpected, "put {!r} before")):
        prefix = more[0].removesuffix(fewer[0]) if more and fewer else ""
        if prefix and more == [prefix + name for name in fewer]:
            raise VicugnaError(f"the tensors do not fit the config: {'; '.join(faults)}",
                               str(where), f"Rename them: {fix.format(prefix)} each of these names")
    if faults:
        raise broken(f"the tensors do not fit the config: {'; '.join(faults)}", where)
