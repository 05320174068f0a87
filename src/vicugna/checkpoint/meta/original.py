"""Meta's original files: `params.json`, `tokenizer.model` and `consolidated.NN.pth`, one for each
tensor-parallel rank. Llama 1 to 4.

A matrix is the concatenation of the ranks' shards, along rows or columns; norms are replicated. See
checkpoint/names for names and splits.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vicugna.checkpoint import names
from vicugna.checkpoint.folder import inside, read_object
from vicugna.checkpoint.gguf.tensors import permuted
from vicugna.checkpoint.meta import params as meta_params
from vicugna.checkpoint.meta import pth
from vicugna.checkpoint.meta.params import Params
from vicugna.checkpoint.names import Parameter, general
from vicugna.checkpoint.stored import Mapped, Stored, broken, merged, short
from vicugna.checkpoint.survey import Survey
from vicugna.errors import VicugnaError
from vicugna.tokenizer import Tokenizer, from_model_file

UNUSED = re.compile(r"(^|\.)(rope\.freqs|freqs_cis|freq_cis|\w*gate_stats_3E|expert_activation_DE)$"
                    r"|_extra_state$")


@dataclass(frozen=True)
class Original:
    """The ranks' tensors by Meta's names, the same on every rank; `is_llama4` is a Llama 4."""

    folder: Path
    params: Params
    ranks: list[dict[str, Stored]]
    is_llama4: bool

    @property
    def tied(self) -> bool:
        """Whether the head is the embeddings: none is there, or (Llama 3.2) the same values are."""
        if "output.weight" not in self.ranks[0]:
            return True
        if self.is_llama4 or not self.params.use_scaled_rope:
            return False
        pairs = [(rank["output.weight"], rank["tok_embeddings.weight"]) for rank in self.ranks]
        return all(a.dtype == b.dtype and torch.equal(*map(Mapped().tensor, (a, b)))
                   for a, b in pairs)

    def stored(self, tied: bool) -> dict[str, Stored]:
        """The tensors by the names of Hugging Face, each merged when it is read."""
        prefix = "language_model." if self.is_llama4 and self.params.vision_args else ""
        sources: dict[str, list[tuple[str, int]]] = {}  # names, and which of their parts
        for name in sorted(self.ranks[0].keys() - ({"output.weight"} if tied else set())):
            layer, _ = general(name)
            for index, held in enumerate(self._held(name)):  # sorted: gate comes before up
                target = held.name.replace("#", layer)
                text = target.startswith(("model.", "lm_head."))
                sources.setdefault(prefix * text + target, []).append((name, index))
        return {target: self._merged(target, made_of) for target, made_of in sources.items()}

    def _held(self, name: str) -> list[Parameter]:
        """The parameters that Meta's tensor `name` holds, in order."""
        known = names.of("llama4" if self.is_llama4 else "llama").by_meta
        if (held := known.get(general(name)[1])) is None:
            raise broken("unexpected: no Llama of Meta has it", self.ranks[0][name].where)
        return held

    def _merged(self, target: str, made_of: list[tuple[str, int]]) -> Stored:
        first = self.ranks[0][made_of[0][0]]
        try:
            parts, split = self._parts(target, made_of, lambda part: torch.empty(
                part.shape, dtype=part.dtype, device="meta"))
            shape = list(parts[0].shape)
            shape[split] = sum(part.shape[split] for part in parts)
            kinds = {(part.dtype, *part.shape[:split], *part.shape[split + 1:]) for part in parts}
            if len(kinds) > 1 or (self._is_permuted(target) and shape[0] % self.params.head_width):
                raise ValueError("its parts do not fit")
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise broken(f"cannot merge {len(self.ranks)} tensor-parallel shards of shape "
                         f"{list(first.shape)} into {target.split('.')[-2]}: "
                         f"{short(str(error).splitlines()[0])}", first.where) from error
        return Stored(target, first.file if len(self.ranks) == 1 else self.folder, 0, first.dtype,
                      tuple(shape), load=lambda: self._whole(target, made_of))

    def _whole(self, target: str, made_of: list[tuple[str, int]]) -> Tensor:
        for name, _ in made_of:
            if self._held(name)[0].split is None:
                self._check_replicas(name)
        parts, split = self._parts(target, made_of, Mapped().tensor)
        whole = torch.cat(parts, split) if parts[1:] else parts[0]
        if self._is_permuted(target):
            whole = permuted(whole, len(whole) // self.params.head_width, back=True)
        return whole.contiguous()

    def _check_replicas(self, name: str) -> None:
        """Raise VicugnaError unless all ranks have nearly the same values: the first one's are
        used, as by Meta, and others far from them are of another model."""
        first, *others = (Mapped().tensor(rank[name]).float() for rank in self.ranks)
        for rank, other in zip(self.ranks[1:], others, strict=True):
            if not torch.allclose(other, first, rtol=0.05, atol=0.01, equal_nan=True):
                raise broken(f"its values are not those in {self.ranks[0][name].file.name}: the "
                             "shards are of several models", rank[name].where)

    def _is_permuted(self, target: str) -> bool:
        """Whether Hugging Face permutes the rows of `target` for RoPE."""
        return not self.is_llama4 and re.search(r"\.[qk]_proj\.", target) is not None

    def _parts(self, target: str, made_of: list[tuple[str, int]],
               pick: Callable[[Stored], Tensor]) -> tuple[list[Tensor], int]:
        """What the tensor `target` is made of, in order, and along which dimension, where `pick`
        gives the ranks' tensors."""
        parts: list[Tensor] = []
        count, split = len(self.ranks), 0
        for name, index in made_of:
            first = self._cut(name, pick(self.ranks[0][name]))[index]
            dim = self._held(name)[0].split
            step, split = (count, 0) if dim is None else (1, dim)
            if re.search(r"(?<!vision_model\.)model\.layers\.\d+\.self_attn\.[kv]_proj", target):
                # Where ranks outnumber the heads of keys and values, neighbours hold the same.
                rows = self.params.groups * self.params.head_width
                step = max(1, len(first) * count // rows)
            if name == "tok_embeddings.weight" and first.shape[1] * count == self.params.dim:
                split = 1  # Llama 1 and 2 split the width, later ones the vocabulary
            parts += [first, *(self._cut(name, pick(rank[name]))[index]
                               for rank in self.ranks[step::step])]
        return parts, split

    def _cut(self, name: str, tensor: Tensor) -> Sequence[Tensor]:
        """What a rank's tensor holds of each tensor of Hugging Face that is made of it."""
        if name.endswith("router_DE"):
            return [tensor.T]
        if ".experts.moe_" in name:
            if self.params.moe_args is None:
                raise ValueError("params.json has no moe_args")
            return [tensor.unflatten(0, (self.params.moe_args.num_experts, -1))]
        if name.endswith("attention.wqkv.weight"):
            queries = self.params.dim // len(self.ranks)
            others = (len(tensor) - queries) // 2
            return tensor.split([queries, others, others])
        return tensor.chunk(2) if name.endswith("mlp.fc1_weight") else [tensor]


def find(folder: Path) -> Path | None:
    """The folder of Meta's files: `folder` or its `original`; None if there are none. OSError."""
    places = (place for place in (folder, folder / "original") if (place / "params.json").exists())
    return next((place for place in places if _files(place)), None)


def _files(folder: Path) -> dict[int, list[str]]:
    """The names of each rank's files: consolidated.NN.pth, or the files in a folder
    consolidated.NN (Llama 3.1 405B, whose ranks are too large for one)."""
    found: dict[int, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if match := re.fullmatch(r"consolidated(?:\.(\d{1,6}))?(\.pth)?", path.name):
            number, inner = int(match[1] or 0), []
            if not match[2] and path.is_dir():
                inner = [f"{path.name}/{file.name}" for file in sorted(path.glob("*.pth"))]
            if names := [path.name] if match[2] else inner:
                if number in found:
                    raise broken(f"{names[0]} is a second shard {number}", folder)
                found[number] = names
    return found


def survey(folder: Path) -> Survey:
    """The survey of Meta's checkpoint in `folder`. Raises VicugnaError; OSError."""
    folder = find(folder) or folder
    path = folder / "params.json"
    params = meta_params.parse(read_object(*_rooted(folder, path.name)), path)
    files = _files(folder)
    if missing := sorted(set(range(len(files))) - files.keys()):
        raise broken(f"consolidated.{missing[0]:02}.pth is missing, but there is a shard "
                     f"{max(files)}", folder)
    ranks = [merged(pth.scan(inside(*_rooted(folder, name)), UNUSED) for name in files[number])
             for number in sorted(files)]
    for rank in ranks[1:]:
        _check_alike(ranks[0], rank)
    is_llama4 = any(".wqkv." in name for name in ranks[0])
    original = Original(folder, params, ranks, is_llama4)
    _check(original)
    tied = original.tied
    stored = original.stored(tied)
    vocabulary = next(tensor.shape[0] for name, tensor in stored.items() if "embed_tokens" in name)
    if not is_llama4 and params.vocab_size not in (None, -1, vocabulary):
        raise broken(f"vocab_size is {params.vocab_size:,}, but there are {vocabulary:,} "
                     "embeddings", path)
    version = ("4" if is_llama4 else "3.1" if params.use_scaled_rope
               else "3" if params.is_llama3 else None)
    tokenizer = _tokenizer(folder, version, vocabulary)
    name = (folder.resolve().parent if folder.name == "original" else folder.resolve()).name
    instruct = re.search("instruct|chat", name, re.IGNORECASE) is not None
    convert = meta_params.llama4 if is_llama4 else meta_params.llama
    config, generation_config = convert(params, vocabulary, tied, instruct)
    return Survey(folder, config, stored, tokenizer, generation_config, {})


def _rooted(folder: Path, name: str) -> tuple[Path, str]:
    """The checkpoint's own folder, out of which links must not lead, and the path of `name` in it.
    """
    return (folder.parent, f"original/{name}") if folder.name == "original" else (folder, name)


def _tokenizer(folder: Path, version: str | None, vocabulary: int) -> Tokenizer | None:
    """The tokenizer, which Llama 1 and 2 came with in the folder above; None if there is none."""
    for place in (folder, folder.parent):
        if (place / "tokenizer.model").exists():
            found = from_model_file(inside(*_rooted(place, "tokenizer.model")), version)
            if found.vocab_size > vocabulary:
                raise broken(f"{found.vocab_size:,} tokens, but {vocabulary:,} embeddings",
                             place / "tokenizer.model")
            return found
    return None


def _check_alike(first: Mapping[str, Stored], other: Mapping[str, Stored]) -> None:
    """Raise VicugnaError unless two ranks hold the same tensors, in the same shapes and dtypes."""
    for name in sorted(first.keys() ^ other.keys()):
        raise broken("not every shard has it", (first.get(name) or other[name]).where)
    for name, stored in other.items():
        due = first[name]
        if (stored.shape, stored.dtype) != (due.shape, due.dtype):
            raise broken(f"{list(stored.shape)} of {stored.dtype}, but {list(due.shape)} of "
                         f"{due.dtype} in {due.file.name}", stored.where)


def _check(original: Original) -> None:
    """Raise VicugnaError unless params.json and the ranks can be of one model."""
    params, rank, count = original.params, original.ranks[0], len(original.ranks)
    for name in ("tok_embeddings.weight", "layers.0.attention.wo.weight"):
        if name not in rank or len(rank[name].shape) != 2:
            raise broken(f"no {name}, or one that is not a matrix", original.folder)
    columns = rank["layers.0.attention.wo.weight"].shape[1]
    if columns * count != params.dim:
        due = f"{params.dim // columns}" if columns and params.dim % columns == 0 else "others"
        raise VicugnaError(f"{count} shards are there, but {due} make a model of width "
                           f"{params.dim}", str(original.folder),
                           "Download the missing consolidated.NN.pth, or the right params.json")
    layers = max(params.n_layers, params.vision_args.n_layers if params.vision_args else 0)
    if layers > len(rank):
        raise broken(f"n_layers is {layers:,}, but there are only {len(rank):,} tensors",
                     original.folder / "params.json")
