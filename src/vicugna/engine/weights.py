"""Packed weights: a network's matrices in the forms in which the engine's products on CPU are
quickest, in place of its own modules.

In which form a matrix is kept is planned first (`plan`), from what the files hold: `vicugna info
--run` prints that, loading (`read`) carries it out.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vicugna import checkpoint
from vicugna.checkpoint.state_dict import Parts
from vicugna.checkpoint.stored import Mapped, Stored
from vicugna.dtypes import name_of
from vicugna.engine import cpu
from vicugna.engine.cpu.formats import FORMATS
from vicugna.errors import VicugnaError, did_you_mean
from vicugna.models.layers.moe import Experts

if TYPE_CHECKING:  # the kernels need numba, which not every machine has
    from vicugna.engine.cpu.linear import Packed

WEIGHTS = ("auto", "float", "bf16", "int8", "int4")
# What matrices are packed into, and the embeddings and the head: quantised to 4 bits these cost
# the most accuracy (docs/log.md).
KINDS = {"bf16": ("bf16", "bf16"), "int8": ("q8_0", "q8_0"), "int4": ("q4_0", "q8_0")}
# Matrices that stay floats. A router that is slightly wrong chooses other experts; DeepSeek's
# attention uses the halves of kv_b_proj apart; images are encoded by the network as it is.
KEPT = ("router", "kv_b_proj")
VISION = ("vision_model.", "multi_modal_projector.")


@dataclass(frozen=True)
class Choice:
    """In what form a parameter is kept, and why: `kind` is one of the engine's packed kinds or a
    float dtype, `stored` what the files hold, `nbytes` what it takes."""

    stored: str
    kind: str
    packed: bool
    why: str
    nbytes: int


def matrices(network: nn.Module) -> dict[str, nn.Module]:
    """The parameters that can be packed, each with its module: Linear, Embedding or Experts."""
    found: dict[str, nn.Module] = {}
    for path, module in network.named_modules():
        if path.startswith(VISION) or path.rpartition(".")[2] in KEPT:
            continue
        if type(module) in (nn.Linear, nn.Embedding):
            found[f"{path}.weight"] = module
        elif isinstance(module, Experts):
            found |= dict.fromkeys((f"{path}.gate_up_proj", f"{path}.down_proj"), module)
    return found


def plan(parts: Parts, weights: str = "auto", dtype: torch.dtype | None = torch.float32,
         device: str | torch.device = "cpu") -> dict[str, Choice]:
    """In what form each parameter is kept, by name (of tied ones one): `weights` is "auto" (what a
    file has quantised stays so, all else is `dtype`), "float" (all `dtype`), or what the matrices
    are packed into: "bf16", "int8", "int4". VicugnaError where that is not possible."""
    if weights not in WEIGHTS:
        raise VicugnaError(f"unknown weights {weights!r}", "load", did_you_mean(weights, WEIGHTS))
    unusable = cpu.why_not() if torch.device(device).type == "cpu" else "they are for CPUs"
    if weights in KINDS and unusable:
        raise VicugnaError(f"weights={weights!r} needs the packed kernels: {unusable}", "load",
                           "Leave weights out, and choose a dtype")
    modules = matrices(parts.network)
    found = {}
    for name, made_of in parts.made_of.items():
        if name in parts.tied:
            continue
        kind, why = None, "norms, biases and routers are floats"
        if name in parts.buffers:
            why = "a buffer"
        elif module := modules.get(name):
            kind, why = _kind(module, parts.state[name], name, made_of, weights, unusable)
        found[name] = _choice(parts, name, kind, why, dtype)
    return found


def _kind(module: nn.Module, like: Tensor, name: str, made_of: Sequence[Stored], weights: str,
          unusable: str) -> tuple[str | None, str]:
    """The packed kind of a matrix, None for floats; and why."""
    if weights == "float" or unusable:
        return None, "asked for" if weights == "float" else f"no packed kernels: {unusable}"
    if weights == "auto":
        kinds = {part.quantised.kind if part.quantised else None for part in made_of}
        if len(kinds) > 1:
            return None, "its parts are of several types"
        kind = kinds.pop()
        return kind, "as the file has it" if kind else "no blocks of a type with kernels"
    outer = isinstance(module, nn.Embedding) or name.endswith("lm_head.weight")
    kind = KINDS[weights][outer]
    if _width(module, like) % FORMATS[kind].columns:
        return None, f"rows of {_width(module, like):,} values do not fill blocks"
    return kind, "asked for"


def _width(module: nn.Module, like: Tensor) -> int:
    """Values in a row of the matrix, or of each of the stack."""
    return like.shape[-2 if getattr(module, "transposed", False) else -1]


def _choice(parts: Parts, name: str, kind: str | None, why: str, dtype: torch.dtype | None
            ) -> Choice:
    made_of, like = parts.made_of[name], parts.state[name]
    first = made_of[0]
    stored = first.quantised.kind if first.quantised else name_of(first.dtype)
    if kind is not None:
        form = FORMATS[kind]
        size = form.bits // 8 if form.is_float else form.block_bytes
        return Choice(stored, kind, True, why, like.numel() // form.columns * size)
    to = like.dtype if name in parts.buffers else dtype or first.kind
    return Choice(stored, name_of(to), False, why, like.numel() * to.itemsize)


def read(path: str | Path, dtype: torch.dtype | None = torch.float32, weights: str = "auto",
         device: str | torch.device = "cpu") -> checkpoint.Checkpoint:
    """Read a checkpoint as `checkpoint.read` does, with its matrices as `plan` says: packed tensor
    by tensor, so that memory holds the packed network and one matrix more. VicugnaError."""
    def pack(parts: Parts, mapped: Mapped) -> set[str]:
        from vicugna.engine.packed import put
        chosen = {name: choice for name, choice in plan(parts, weights, dtype, device).items()
                  if choice.packed}
        floats = parts.kinds_of(parts.made_of.keys() - chosen.keys() - parts.tied.keys())
        computed = dtype or next(iter(floats), torch.float32)
        for name in parts.in_order(chosen):
            matrix = _from_blocks if weights == "auto" else _from_floats
            made = [*matrix(parts, name, chosen[name].kind, mapped)]
            put(parts.network, name, made, computed, parts.tied)
        return {*chosen}

    return checkpoint.read(path, dtype, device, None if weights == "float" else pack,
                           weights if weights in KINDS else None)


def _matrices_of(parts: Parts, name: str) -> Iterator[list[Stored]]:
    """The stored tensors that make up each matrix of a parameter, or all matrices of a stack."""
    made_of, like = parts.made_of[name], parts.state[name]
    step = max(1, len(made_of) // (len(like) if like.dim() == 3 else 1))
    for start in range(0, len(made_of), step):
        yield made_of[start : start + step]


def _from_blocks(parts: Parts, name: str, kind: str, mapped: Mapped) -> Iterator["Packed"]:
    """A parameter's matrices, packed out of the file's own blocks."""
    from vicugna.engine.cpu.linear import from_gguf
    for group in _matrices_of(parts, name):
        with ExitStack() as opened:
            blocks = [opened.enter_context(mapped.blocks(part)) for part in group]
            rows = torch.cat([one.rows for one in blocks], -2) if group[1:] else blocks[0].rows
            for matrix in rows if rows.dim() == 3 else rows[None]:
                yield from_gguf(kind, matrix.numpy(), (len(matrix), blocks[0].shape[-1]))


def _from_floats(parts: Parts, name: str, kind: str, mapped: Mapped) -> Iterator["Packed"]:
    """A parameter's matrices, quantised out of floats."""
    from vicugna.engine.cpu.linear import pack
    module = matrices(parts.network)[name]
    for group in _matrices_of(parts, name):
        first = group[0]
        shape = (len(group) * first.shape[0], *first.shape[1:])
        whole = mapped.read(group, shape, first.kind, torch.device("cpu"))
        for matrix in _single(module, whole):
            yield pack(matrix, kind)
        mapped.drop_pages(whole)


def _single(module: nn.Module, weight: Tensor) -> Iterable[Tensor]:
    """The matrix, or those of a stack, with the rows by which products go."""
    weight = weight.mT if getattr(module, "transposed", False) else weight
    return weight.contiguous().unbind() if weight.dim() == 3 else [weight]
