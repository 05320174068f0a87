"""The tensors of GGUF files and those of Hugging Face folders: their names, and how the values of
one lie in the other.

A tensor of a file may hold the experts of a layer, each a tensor of the folder; or one of the
folder holds what are two tensors in the file.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vicugna.checkpoint.gguf.keys import ARCHITECTURES, parsed
from vicugna.checkpoint.stored import Stored, broken, short
from vicugna.errors import VicugnaError

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
FREQUENCIES = "rope_freqs.weight"  # what llama.cpp divides RoPE's frequencies by
# Names of a folder that do not end in .weight or .bias, as if they did.
ENDINGS = {"experts.gate_up_proj": "experts.gate_up_proj.weight",
           "experts.down_proj": "experts.down_proj.weight",
           "e_score_correction_bias": "e_score_correction.bias"}


def _mlp(ours: str, kind: str = "", parts: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
         ) -> dict[str, str]:
    return {f"ffn_{theirs}{kind}": f"{ours}.{part}"
            for theirs, part in zip(("gate", "up", "down"), parts, strict=True)}


# Per model_type GGUF's names of a layer's tensors, and those in a folder; * is the expert's number.
ATTENTION = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj"}
DENSE = ATTENTION | _mlp("mlp")
LAYER = {
    "llama": DENSE, "mistral": DENSE, "qwen2": DENSE,
    "mixtral": ATTENTION | {"ffn_gate_inp": "block_sparse_moe.gate"} | _mlp(
        "block_sparse_moe.experts.*", "_exps", ("w1", "w3", "w2")),
    "llama4_text": ATTENTION | {"ffn_gate_inp": "feed_forward.router"} | _mlp("feed_forward")
    | _mlp("feed_forward.shared_expert", "_shexp")
    | _mlp("feed_forward.experts", "_exps", ("gate_up_proj", "gate_up_proj", "down_proj")),
    "deepseek_v3": DENSE | {
        "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj", "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm", "attn_k_b": "self_attn.kv_b_proj",
        "attn_v_b": "self_attn.kv_b_proj", "ffn_gate_inp": "mlp.gate",
        "exp_probs_b": "mlp.gate.e_score_correction"}
    | _mlp("mlp.shared_experts", "_shexp") | _mlp("mlp.experts.*", "_exps")}


@dataclass(frozen=True)
class Form:
    """How the values of a tensor of a folder lie in those of a file that hold it."""

    split: Callable[[Tensor], Sequence[Tensor]] = lambda ours: [ours]
    join: Callable[[Sequence[Tensor]], Tensor] = lambda theirs: theirs[0]


PLAIN = Form()


def forms(config: Mapping[str, Any]) -> dict[str, Form]:
    """Of tensors of a folder, by their names in a layer, those that lie otherwise in a file."""
    shape, kind = parsed(config), config["model_type"]
    if ARCHITECTURES[kind] == "llama":
        return {"self_attn.q_proj": _turning(shape.num_attention_heads),
                "self_attn.k_proj": _turning(shape.num_key_value_heads)}
    if kind == "llama4_text":  # whose experts are transposed
        return {"feed_forward.experts.gate_up_proj": Form(
                    lambda ours: ours.mT.chunk(2, dim=1),
                    lambda theirs: torch.cat([*theirs], dim=1).mT),
                "feed_forward.experts.down_proj": Form(
                    lambda ours: [ours.mT], lambda theirs: theirs[0].mT)}
    if kind != "deepseek_v3":
        return {}
    H, C, U = shape.num_attention_heads, shape.qk_nope_head_dim, shape.v_head_dim

    def keys_and_values(ours: Tensor) -> Sequence[Tensor]:
        k_HCR, v_HUR = ours.unflatten(0, (H, C + U)).split((C, U), dim=1)
        return k_HCR.mT, v_HUR

    found = {"self_attn.kv_b_proj": Form(
        keys_and_values, lambda theirs: torch.cat((theirs[0].mT, theirs[1]), dim=1).flatten(0, 1))}
    if not shape.rope_interleave:
        found |= {"self_attn.q_proj": _turning(H, C), "self_attn.q_b_proj": _turning(H, C),
                  "self_attn.kv_a_proj_with_mqa": _turning(1, shape.kv_lora_rank)}
    return found


def _turning(heads: int, first: int = 0) -> Form:
    return Form(lambda ours: [turned(ours, heads, first)],
                lambda theirs: turned(theirs[0], heads, first, back=True))


def turned(tensor: Tensor, heads: int, first: int = 0, back: bool = False) -> Tensor:
    """The rows of each head, from number `first` on, from the two halves that Hugging Face rotates
    against each other to neighbours, as in Meta's files, which llama.cpp keeps for some of its
    architectures; or `back`."""
    rows = tensor.unflatten(0, (heads, -1))
    pairs = rows[:, first:].unflatten(1, (-1, 2) if back else (2, -1)).transpose(1, 2)
    return torch.cat((rows[:, :first], pairs.flatten(1, 2)), dim=1).flatten(0, 1)


@dataclass(frozen=True)
class Group:
    """Tensors of a file (`names`) and those of a folder that they are made of: one of several
    experts, or several of one."""

    names: Sequence[str]
    sources: list[Stored]
    form: Form

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Those of the file's tensors."""
        parts = self.form.split(torch.empty(self.sources[0].shape, device="meta"))
        stack = (len(self.sources),) if "_exps" in self.names[0] and parts[0].dim() < 3 else ()
        return [stack + tuple(part.shape) for part in parts]


def groups(config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> list[Group]:
    """All that a file of these tensors of a folder holds, in order. VicugnaError."""
    found: dict[str, Group] = {}
    table, lying = LAYER[config["model_type"]], forms(config)
    for name in sorted(tensors, key=_order):
        layer, ours, ending = _taken_apart(name)
        names = [f"{layer and f'blk.{layer}.'}{theirs}{ending}"
                 for theirs, known in (table if layer else OUTSIDE).items() if known == ours]
        if not names:
            raise VicugnaError(f"GGUF has no name for tensor {short(name)}", "",
                               "Convert to a Hugging Face folder instead")
        found.setdefault(names[0], Group(names, [], lying.get(ours, PLAIN))
                         ).sources.append(tensors[name])
    return [*found.values()]


def _order(name: str) -> tuple[Any, ...]:
    """Layers and experts by number, the embeddings first."""
    numbers = [int(number) for number in re.findall(r"\.(\d+)\.", name)]
    return "embed" not in name, not numbers, numbers[:1], _taken_apart(name)[1:], numbers


def _taken_apart(name: str) -> tuple[str, str, str]:
    """The layer of a tensor of a folder ("" for one outside), its name in it with * for the number
    of an expert, and its ending."""
    for known, regular in ENDINGS.items():
        if name.endswith(f".{known}"):
            name = name.removesuffix(known) + regular
    match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*?)(\.weight|\.bias|)", name)
    layer, ours, ending = match.groups() if match else (None, name, "")
    return layer or "", re.sub(r"experts\.\d+\.", "experts.*.", ours), ending


def our_name(name: str, kind: str) -> tuple[str, str, int, int]:
    """Of a tensor of a file of this model_type: its name in a folder (* for an expert's number),
    without layer and ending too, which part of it this is, and of how many."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)(\.weight|\.bias)", name)
    table = LAYER[kind] if match and match[1] else OUTSIDE
    if not match or (ours := table.get(match[2])) is None:
        raise broken(f"unexpected tensor {short(name)}", "")
    whole = (f"model.layers.{match[1]}." if match[1] else "") + ours + match[3]
    for known, regular in ENDINGS.items():
        if whole.endswith(f".{regular}"):
            whole = whole.removesuffix(regular) + known
    parts = [theirs for theirs, other in table.items() if other == ours]
    return whole, ours, parts.index(match[2]), len(parts)
