"""Between a checkpoint's tensors and a network's state dict.

A network may stack in one parameter what files hold apart (a mixture's experts), and files may hold
tensors that it does not compute with, which are passed through. See checkpoint/names.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vicugna import models
from vicugna.checkpoint import names
from vicugna.checkpoint.names import Names
from vicugna.checkpoint.stored import Mapped, Stored, broken, short
from vicugna.errors import VicugnaError
from vicugna.files import disk_errors

LAYERS, EXPERTS = 400, 2**16  # more would only take time, or memory
AT_ONCE = 2**28  # bytes of weights; looking at all values of more takes most of the time to load


def build(config: Mapping[str, Any], stored: Mapping[str, Stored], where: str) -> nn.Module:
    """The network that config.json describes, without memory for its weights yet.
    VicugnaError for a config that fits no network, or one far larger than `stored`."""
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
        with torch.device("meta"), _SkipInit():
            return module.Network(chosen)
    except VicugnaError as error:
        raise VicugnaError(error.what, where, error.fix) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise broken(f"no network can be built from it: {reason}", where) from error


class _SkipInit(TorchFunctionMode):
    """Skip initialisation: the checkpoint's values replace what it would draw."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" and "tensor" in kwargs:
            return kwargs["tensor"]
        return func(*args, **kwargs)


def fill(network: Any, stored: Mapping[str, Stored], dtype: torch.dtype | None,
         device: torch.device, where: str | Path
         ) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Load the tensors straight into a network on the meta device, as `values` gives them.

    Returns the pass-through tensors, as they are stored, on the CPU; and a check that raises
    VicugnaError for values that are not finite in large weights that stay mapped. The network's
    first forward pass calls it; who saves or digests it, and so reads all values anyway, does too.
    VicugnaError where names or shapes do not fit, and for values that are not finite elsewhere.
    """
    mapped = Mapped(later=sum(part.nbytes for part in stored.values()) > AT_ONCE)
    place(network, dict(values(network, stored, dtype, device, where, mapped)))
    passthrough = {name: mapped.read([part], part.shape, part.kind, torch.device("cpu"))
                   for name, part in parts(network, stored, where)[1].items()}
    network.eval()
    if not mapped.unchecked:
        return passthrough, lambda: None  # and the mappings of converted tensors go

    def first_run(*_: Any) -> None:
        mapped.check()
        hook.remove()

    hook = network.register_forward_pre_hook(first_run)
    return passthrough, mapped.check


def values(network: Any, stored: Mapping[str, Stored], dtype: torch.dtype | None,
           device: torch.device, where: str | Path, mapped: Mapped) -> Iterator[tuple[str, Tensor]]:
    """The network's parameters (of tied ones one) and buffers by name, each read by `mapped` when
    its turn comes, in the order of the disk.

    Parameters become `dtype`; None keeps what is stored. VicugnaError where names or shapes do not
    fit, and for values that are not finite.
    """
    state, tied = network.state_dict(), ties(network)
    made_of, _ = _parts(network, state, tied, stored, where)
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    kinds = {part.kind for name in made_of.keys() & parameters for part in made_of[name]}
    if dtype is None and len(kinds) > 1:
        raise VicugnaError(f"its weights are stored as {' and '.join(sorted(map(str, kinds)))}",
                           str(where), "Load it as one of them: dtype='float32' or 'bfloat16'")

    def read(name: str) -> Tensor:
        kind = (dtype or made_of[name][0].kind) if name in parameters else state[name].dtype
        return mapped.read(made_of[name], state[name].shape, kind, device)

    for name in sorted(made_of, key=lambda name: (made_of[name][0].file, made_of[name][0].begin)):
        if name not in tied:
            yield name, read(name)
        elif not torch.equal(read(name), read(tied[name])):
            raise VicugnaError(f"{name} differs from the embeddings, but the config ties them",
                               str(where), "Set tie_word_embeddings to false in it")


def streamed(network: Any, stored: Mapping[str, Stored], dtype: torch.dtype | None,
             where: str | Path) -> Iterator[tuple[str, Tensor]]:
    """`values` on the CPU, each of which is valid until the next one is asked for."""
    mapped = Mapped()
    with disk_errors(where):
        for name, tensor in values(network, stored, dtype, torch.device("cpu"), where, mapped):
            yield name, tensor
            mapped.drop_pages(tensor)


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


def parts(network: Any, stored: Mapping[str, Stored], where: str | Path
          ) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """The tensors that `network` is made of (of tied ones one), and the pass-through ones, by their
    names in files. VicugnaError where names or shapes do not fit."""
    tied = ties(network)
    made_of, passthrough = _parts(network, network.state_dict(), tied, stored, where)
    return {part.name: part for name, those in made_of.items() if name not in tied
            for part in those}, passthrough


def _parts(network: Any, state: Mapping[str, Tensor], tied: Mapping[str, str],
           stored: Mapping[str, Stored], where: str | Path
           ) -> tuple[dict[str, list[Stored]], dict[str, Stored]]:
    """What each parameter and buffer is made of, in order, and the pass-through tensors."""
    naming = names_of(network)
    passthrough = {name: tensor for name, tensor in stored.items()
              if naming.passthrough(name, network.config)}
    # A tied head may be stored too, and (before transformers 4.31) RoPE's frequencies.
    stored = {name: tensor for name, tensor in stored.items()
              if name not in passthrough and not name.endswith("rotary_emb.inv_freq")}
    for name, other in tied.items():  # safetensors' save_model keeps the head of the two
        if name in stored and other not in stored:
            stored[other] = stored.pop(name).renamed(other)
    made_of: dict[str, list[str]] = {}
    for name, tensor in state.items():
        if name in stored or name not in tied:
            # The names of more experts than there are tensors would only fill memory.
            whole = name in stored or (tensor.dim() > 2 and len(tensor) > len(stored))
            made_of[name] = (not whole and naming.of_experts(name, len(tensor))) or [name]
    _compare({one: _shape(state[name], name, those) for name, those in made_of.items()
              for one in those}, stored, where)
    return {name: [stored[one] for one in those] for name, those in made_of.items()}, passthrough


def named_tensors(network: Any) -> dict[str, Tensor]:
    """The network's parameters (tied ones once, experts apart) and buffers, by
    their names in a checkpoint's files and without copies."""
    tied, state = ties(network), network.state_dict()
    return {part: view for name, tensor in state.items() if name not in tied
            for part, view in split(network, name, tensor).items()}


def split(network: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors that files hold of a parameter, by name: of a stack each expert's."""
    parts = names_of(network).of_experts(name, len(tensor) if tensor.dim() else 0) or [name]
    views = tensor.reshape(len(parts), *_shape(tensor, name, parts))
    return dict(zip(parts, views, strict=True))


def names_of(network: Any) -> Names:
    """The names of the network's architecture."""
    return names.of(network.config.to_dict()["model_type"])


def ties(network: nn.Module) -> dict[str, str]:
    """Names of parameters that are only another name of an earlier one, and that one's."""
    first: dict[int, str] = {}
    every = network.named_parameters(remove_duplicate=False)
    return {name: other for name, parameter in every
            if (other := first.setdefault(id(parameter), name)) != name}


def _shape(tensor: Tensor, name: str, names: Sequence[str]) -> tuple[int, ...]:
    """The shape of each part of the parameter `name` that files hold under `names`."""
    if names == [name]:
        return tuple(tensor.shape)
    return math.prod(tensor.shape[:-1]) // len(names), tensor.shape[-1]


def _compare(wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored],
             where: str | Path) -> None:
    """Raise VicugnaError unless names and shapes of the weights are those of the network."""
    shapes = [f"{name} is {list(stored[name].shape)} instead of {list(wanted[name])}"
              for name in sorted(wanted.keys() & stored.keys())
              if stored[name].shape != wanted[name]]
    faults = [f"{kind} {', '.join(names[:3])}" + f" and {len(names) - 3:,} more" * (len(names) > 3)
              for kind, names in (("missing", sorted(wanted.keys() - stored.keys())),
                                  ("unexpected", sorted(map(short, stored.keys() - wanted.keys()))),
                                  ("wrong shape:", shapes)) if names]
    if faults:
        raise broken(f"the tensors do not fit the config: {'; '.join(faults)}", where)
