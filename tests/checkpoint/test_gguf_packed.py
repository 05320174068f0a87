"""GGUF files whose quantised tensors stay packed in memory."""

from pathlib import Path
from typing import Any

import ggml_blocks
import gguf
import gguf_kit
import numpy as np
import pytest
import torch
from gguf_kit import MODELS, folder_of, rewritten
from torch import Tensor, nn

import vicugna
from vicugna import checkpoint
from vicugna.checkpoint.convert import convert
from vicugna.checkpoint.stored import BLOCKS
from vicugna.engine import weights
from vicugna.engine.cpu import linear
from vicugna.engine.packed import PackedEmbedding, PackedLinear
from vicugna.errors import VicugnaError


def quantised(folder: Path, changes: dict, dtype: str) -> Path:
    """A GGUF file of a tiny model, its matrices quantised."""
    folder_of(folder / "a", changes, None)
    convert(folder / "a", folder / "m.gguf", dtype=dtype, lossy=True)
    return folder / "m.gguf"


def of_blocks(folder: Path, kind: str, changes: dict | None = None) -> Path:
    """A GGUF file of a tiny model whose matrices are random blocks of this kind."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    path = quantised(folder, MODELS["llama"] | wide | (changes or {}), "float32")
    shapes = {tensor.name: [int(n) for n in reversed(tensor.shape)]
              for tensor in gguf.GGUFReader(path).tensors}
    blocks = {name: (ggml_blocks.random_rows(kind, shape[0], shape[1], seed=n),
                     ggml_blocks.ggml_type(kind))
              for n, (name, shape) in enumerate(shapes.items()) if len(shape) == 2}
    return rewritten(path, folder / "blocks.gguf", tensors=blocks)


def decoded(packed: Any) -> Tensor:
    return linear.rows(packed, torch.arange(packed.shape[0]))


def weight_of(network: nn.Module, name: str) -> Tensor:
    """The values of a parameter, also of a packed one."""
    path, _, last = name.rpartition(".")
    module: Any = network.get_submodule(path)
    if isinstance(module, PackedLinear | PackedEmbedding) and last == "weight":
        return decoded(module.packed)
    held = getattr(module, last)
    if isinstance(held, nn.ModuleList):
        stack = torch.stack([decoded(one.packed) for one in held])
        return stack.mT if module.transposed else stack
    return held.detach()


def packed_modules(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules()
            if isinstance(module, PackedLinear | PackedEmbedding)]


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_matrices_hold_the_values_of_the_file(tmp_path, name, dtype):
    """Of every architecture, also where rows are permuted for RoPE and experts are stacked."""
    path = quantised(tmp_path, MODELS[name], dtype)
    packed, plain = weights.read(path).network, checkpoint.read(path).network
    for parameter, value in plain.named_parameters():
        assert torch.equal(weight_of(packed, parameter), value), parameter
    floats = {parameter for parameter, value in packed.named_parameters() if value.dim() > 1}
    assert all(one.endswith(("kv_b_proj.weight", "router.weight", "gate.weight"))
               for one in floats)
    assert packed_modules(packed)


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_kind_of_blocks(tmp_path, kind):
    path = of_blocks(tmp_path, kind)
    packed, plain = weights.read(path).network, checkpoint.read(path).network
    for parameter, value in plain.named_parameters():
        assert torch.equal(weight_of(packed, parameter), value), parameter
    tokens = torch.randint(0, 600, (1, 20), generator=torch.Generator().manual_seed(0))
    ours, theirs = (vicugna.Model(network).logits(tokens) for network in (packed, plain))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.99


def test_tied_embeddings_and_head_share_one_copy(tmp_path):
    network: Any = weights.read(quantised(tmp_path, MODELS["llama tied"], "q4_0")).network
    assert isinstance(network.lm_head, PackedLinear)
    assert network.lm_head.packed is network.model.embed_tokens.packed


def test_types_without_kernels_are_decoded(tmp_path):
    path = of_blocks(tmp_path, "q5_1")
    network = weights.read(path).network
    assert not packed_modules(network)
    for name, value in checkpoint.read(path).network.named_parameters():
        assert torch.equal(network.get_parameter(name), value)


def test_factors_that_are_not_finite_are_refused(tmp_path):
    path = of_blocks(tmp_path, "q4_0")
    rows = ggml_blocks.random_rows("q4_0", 610, 256)
    rows[7, 18:20] = np.array([np.inf], np.float16).view(np.uint8)
    broken = rewritten(path, tmp_path / "nan.gguf", tensors={
        "token_embd.weight": (rows, ggml_blocks.ggml_type("q4_0"))})
    with pytest.raises(VicugnaError, match=r"embed_tokens.*: 1 of 4,880 factors of q4_0 block"):
        weights.read(broken)


def test_the_digest_is_that_of_the_blocks(tmp_path):
    """It does not depend on what the file is called, does on every bit of it, and is not that of
    the floats."""
    path = of_blocks(tmp_path, "q4_0")
    model = vicugna.load(path)
    again = path.rename(tmp_path / "other.gguf")
    assert vicugna.load(again).digest == model.digest
    rows = ggml_blocks.random_rows("q4_0", 610, 256, seed=99)
    changed = rewritten(again, tmp_path / "changed.gguf", tensors={
        "output.weight": (rows, ggml_blocks.ggml_type("q4_0"))})
    digests = {vicugna.load(one, weights=how).digest
               for one in (again, changed) for how in ("auto", "float", "int8", "int4")}
    assert len(digests) == 8


def test_a_packed_model_is_not_saved(tmp_path):
    path = of_blocks(tmp_path, "q8_0")
    with pytest.raises(VicugnaError, match="packed for inference"):
        vicugna.load(path).save(tmp_path / "b")
    assert not (tmp_path / "b").exists()
    vicugna.load(path, weights="float").save(tmp_path / "b")
    gguf_kit.same(checkpoint.read(path), checkpoint.read(tmp_path / "b"))
