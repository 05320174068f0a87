"""The tensors of GGUF files and those of Hugging Face folders: names and layouts.

A tensor of a file may hold the experts of a layer, each a tensor of the folder; or one of the
folder holds what are two tensors in the file.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vicugna.checkpoint import names
from vicugna.checkpoint.gguf.file import unrepresentable
from vicugna.checkpoint.gguf.keys import ARCHITECTURES, parsed
from vicugna.checkpoint.names import general
from vicugna.checkpoint.stored import Stored, broken, short

FREQUENCIES = "rope_freqs.weight"  # what llama.cpp divides RoPE's frequencies by


@dataclass(frozen=True)
class Layout:
    """How a tensor of a folder is laid out in the tensors of a file that hold it. `rows` makes the
    rows by which products go of theirs, whatever a row holds: values or blocks; None: no rows do.
    """

    split: Callable[[Tensor], Sequence[Tensor]] = lambda ours: [ours]
    join: Callable[[Sequence[Tensor]], Tensor] = lambda theirs: theirs[0]
    rows: Callable[[Sequence[Tensor]], Tensor] | None = lambda theirs: theirs[0]


PLAIN = Layout()


def layouts(config: Mapping[str, Any]) -> dict[str, Layout]:
    """The tensors of a layer, by their names in a folder, that a file lays out otherwise."""
    shape, kind = parsed(config), config["model_type"]
    if ARCHITECTURES[kind] == "llama":
        return {"self_attn.q_proj": _permuting(shape.num_attention_heads),
                "self_attn.k_proj": _permuting(shape.num_key_value_heads)}
    if kind == "llama4_text":  # whose experts are transposed
        return {"feed_forward.experts.gate_up_proj": Layout(
                    lambda ours: ours.mT.chunk(2, dim=1),
                    lambda theirs: torch.cat([*theirs], dim=1).mT,
                    lambda theirs: torch.cat([*theirs], dim=1)),
                "feed_forward.experts.down_proj": Layout(
                    lambda ours: [ours.mT], lambda theirs: theirs[0].mT)}
    if kind != "deepseek_v3":
        return {}
    H, C, U = shape.num_attention_heads, shape.qk_nope_head_dim, shape.v_head_dim

    def keys_and_values(ours: Tensor) -> Sequence[Tensor]:
        k_HCR, v_HUR = ours.unflatten(0, (H, C + U)).split((C, U), dim=1)
        return k_HCR.mT, v_HUR

    found = {"self_attn.kv_b_proj": Layout(
        keys_and_values, lambda theirs: torch.cat((theirs[0].mT, theirs[1]), dim=1).flatten(0, 1),
        None)}
    if not shape.rope_interleave:
        found |= {"self_attn.q_proj": _permuting(H, C), "self_attn.q_b_proj": _permuting(H, C),
                  "self_attn.kv_a_proj_with_mqa": _permuting(1, shape.kv_lora_rank)}
    return found


def _permuting(heads: int, first: int = 0) -> Layout:
    def join(theirs: Sequence[Tensor]) -> Tensor:
        return permuted(theirs[0], heads, first, back=True)

    return Layout(lambda ours: [permuted(ours, heads, first)], join, join)


def permuted(tensor: Tensor, heads: int, first: int = 0, back: bool = False) -> Tensor:
    """q_proj or k_proj with the rows of each head, from number `first` on, permuted for RoPE: from
    the halves that Hugging Face rotates to the neighbouring pairs of Meta's files, which llama.cpp
    rotates in some of its architectures; or `back`."""
    rows = tensor.unflatten(0, (heads, -1))
    pairs = rows[:, first:].unflatten(1, (-1, 2) if back else (2, -1)).transpose(1, 2).flatten(1, 2)
    if first:  # else spared: of a meta tensor it would import much of PyTorch's compiler
        pairs = torch.cat((rows[:, :first], pairs), dim=1)
    return pairs.flatten(0, 1)


@dataclass(frozen=True)
class Target:
    """A tensor of a file, made of tensors of a folder (several are the experts of a stack): of what
    `layout` makes of each, the one at `index`."""

    name: str
    index: int
    layout: Layout
    sources: list[Stored]

    def part(self, source: Tensor) -> Tensor:
        """What it holds of a source."""
        return self.layout.split(source)[self.index]

    @property
    def shape(self) -> tuple[int, ...]:
        part = self.part(torch.empty(self.sources[0].shape, device="meta"))
        stack = (len(self.sources),) if "_exps" in self.name and part.dim() < 3 else ()
        return stack + tuple(part.shape)


def targets(config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> list[Target]:
    """All that a file of these tensors of a folder holds, in order; those of the same source follow
    each other. VicugnaError."""
    found: dict[str, Target] = {}
    table, special = names.of(config["model_type"]).by_name, layouts(config)
    for name in sorted(tensors, key=_order):
        layer, anywhere = general(name)
        if not (parameter := table.get(anywhere)) or not parameter.gguf:
            raise unrepresentable(f"tensor {short(name)}")
        layout = special.get(in_layer(name), PLAIN)
        for index, theirs in enumerate(one.replace("#", layer) for one in parameter.gguf):
            found.setdefault(theirs, Target(theirs, index, layout, [])
                             ).sources.append(tensors[name])
    return [*found.values()]


def _order(name: str) -> tuple[Any, ...]:
    """Layers and experts by number, the embeddings first."""
    numbers = [int(number) for number in re.findall(r"\.(\d+)\.", name)]
    return "embed" not in name, not numbers, numbers[:1], general(name)[1], numbers


def in_layer(name: str) -> str:
    """The name of a tensor in its layer, without its ending."""
    return re.sub(r"^model\.layers\.[\d#]+\.|\.(weight|bias)$", "", name)


def hf_name(name: str, kind: str) -> tuple[str, list[str]]:
    """Of a tensor of a file of this model_type: its name in a folder (* for an expert's number),
    and the names of all tensors of the file that hold a part of that, in order."""
    layer, anywhere = general(name)
    if (found := names.of(kind).by_gguf.get(anywhere)) is None:
        raise broken(f"unexpected tensor {short(name)}", "")
    return found.name.replace("#", layer), [part.replace("#", layer) for part in found.gguf]
