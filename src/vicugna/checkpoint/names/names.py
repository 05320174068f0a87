"""How an architecture's parameters are called in the files of each form."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Parameter:
    """A parameter of a model; "#" stands for a layer's number, "*" for an expert's.

    name    in Hugging Face's files
    gguf    the tensors of a GGUF file that hold it, each a part, or all experts of a layer
    meta    tensors of Meta's files that hold it, alone or with others in the order of the table
    split   the dimension along which Meta's tensor-parallel ranks share it; None: all have it whole
    """

    name: str
    gguf: tuple[str, ...] = ()
    meta: tuple[str, ...] = ()
    split: int | None = None


LAYER = ("model.layers.#.", "blk.#.", "layers.#.")  # of the text model


def parameters(prefixes: tuple[str, str, str], *rows: tuple[str, str, str, int | None]
               ) -> tuple[Parameter, ...]:
    """A table of name, GGUF's names, Meta's names (separated by spaces; those of each form with its
    prefix before them) and split. Weights' names stand for their biases too, which are not shared
    by ranks that share a weight's columns."""
    ours, gguf, meta = prefixes
    weights = [Parameter(ours + row[0], tuple(gguf + name for name in row[1].split()),
                         tuple(meta + name for name in row[2].split()), row[3]) for row in rows]
    biases = [Parameter(bias, _biases(one.gguf), _biases(one.meta), 0 if one.split == 0 else None)
              for one in weights for bias in _biases((one.name,))]
    return (*weights, *biases)


def _biases(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name.removesuffix('weight')}bias" for name in names if name.endswith(".weight"))


def general(name: str) -> tuple[str, str]:
    """The number of a tensor's layer ("" outside), and its name with "#" for that and "*" for an
    expert's."""
    layer = re.search(r"\.(\d+)\.", name)
    name = re.sub(r"\.\d+\.", ".#.", name, count=1)
    return layer[1] if layer else "", re.sub(r"\.\d+\.", ".*.", name)


@dataclass(frozen=True)
class Names:
    """What there is to know of an architecture's files.

    parameters    their names in each form, where it has others than the network's own
    experts       of a stack of experts, by the end of its name: the tensors that Hugging Face's
                  files hold of each expert, in the order in which they are stacked
    passthrough   whether a tensor (its name, the network's config) is not computed with
    normalise     config.json, corrected by the names of the tensors that are stored
    """

    parameters: tuple[Parameter, ...] = ()
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    passthrough: Callable[[str, Any], bool] = lambda name, config: False
    normalise: Callable[[Mapping[str, Any], Collection[str]], Mapping[str, Any]] = (
        lambda config, stored: config)

    @cached_property
    def by_name(self) -> dict[str, Parameter]:
        """The parameters by Hugging Face's names."""
        return {one.name: one for one in self.parameters}

    @cached_property
    def by_gguf(self) -> dict[str, Parameter]:
        """The parameters by each of GGUF's names."""
        return {name: one for one in self.parameters for name in one.gguf}

    @cached_property
    def by_meta(self) -> dict[str, list[Parameter]]:
        """What each of Meta's tensors holds, in order."""
        found: dict[str, list[Parameter]] = {}
        for one in self.parameters:
            for name in one.meta:
                found.setdefault(name, []).append(one)
        return found

    def of_experts(self, name: str, count: int) -> list[str] | None:
        """The tensors of files that make up the stack `name` of `count` experts, in order; None
        for a parameter that is stored under its own name."""
        for end, parts in self.experts.items():
            if name.endswith(f".{end}"):
                stem = name.removesuffix(end)
                return [stem + part.replace("*", str(expert))
                        for expert in range(count) for part in parts]
        return None
