"""Stacked parameters, pass-through tensors and FP8: what lies between files and a network."""

import json
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
from every import OURS, save
from hypothesis import given, settings
from hypothesis import strategies as st

import vicugna
from vicugna import checkpoint, models
from vicugna.checkpoint import load
from vicugna.checkpoint import stored as stored_tensors
from vicugna.checkpoint.hf import weights
from vicugna.checkpoint.names import ARCHITECTURES, Names
from vicugna.checkpoint.stored import Mapped, raw_bytes
from vicugna.errors import VicugnaError

NAMES = Names(experts={"mlp.gate_up_proj": ("mlp.*.w1", "mlp.*.w3"),
                       "mlp.down_proj": ("mlp.*.w2",)},
              passthrough=lambda name, config: name.startswith("later."))


@pytest.fixture
def network(monkeypatch):
    """A mixture whose files hold a tensor for each expert, and some that it does not use."""
    monkeypatch.setitem(ARCHITECTURES, "vicugna", NAMES)
    network = models.build(OURS)
    models.initialise(network, 0)
    return network


@pytest.fixture
def model(network):
    """The same with pass-through tensors."""
    passthrough = {"later.a": torch.randn(3, 5).half(), "later.b": torch.tensor([1.0, -0.0])}
    return vicugna.Model(network, None, {}, checkpoint.Origin(
        network.config.to_dict(), None, {}, passthrough))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / weights.SINGLE)


def rewrite(folder: Path, change) -> None:
    """Replace the weights file by what `change` makes of its tensors."""
    tensors = stored(folder)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / weights.SINGLE, {"format": "pt"})


def fails(folder: Path, says: str, dtype=torch.float32) -> None:
    with pytest.raises(VicugnaError, match=re.escape(says)) as caught:
        checkpoint.read(folder, dtype)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


# Stacked experts.

def test_files_hold_a_tensor_for_each_expert(network, tmp_path):
    checkpoint.Checkpoint(network).save(tmp_path / "m")
    written, moe = stored(tmp_path / "m"), network.model.layers[1].mlp
    names = [name for name in written if ".1.mlp." in name and "router" not in name]
    assert sorted(names) == sorted([
        "model.layers.1.mlp.expert_bias",
        *(f"model.layers.1.mlp.{e}.{w}" for e in range(4) for w in ("w1", "w2", "w3"))])
    for e in range(4):
        gate, up = moe.gate_up_proj[e].chunk(2)
        for name, due in (("w1", gate), ("w3", up), ("w2", moe.down_proj[e])):
            assert torch.equal(written[f"model.layers.1.mlp.{e}.{name}"], due)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_experts_are_stacked_again(network, tmp_path, dtype):
    checkpoint.Checkpoint(network).save(tmp_path / "m")
    read = checkpoint.read(tmp_path / "m", dtype)
    for name, tensor in network.state_dict().items():
        again = read.network.state_dict()[name]
        assert again.dtype == (tensor.dtype if name.endswith("bias") else dtype or tensor.dtype)
        assert torch.equal(again, tensor.to(again.dtype)), name
    read.save(tmp_path / "again")
    if dtype is not torch.bfloat16:
        assert ((tmp_path / "m" / weights.SINGLE).read_bytes()
                == (tmp_path / "again" / weights.SINGLE).read_bytes())


def test_names_and_digest_take_no_copies(network, model):
    named = model.tensors()
    stack = network.model.layers[0].mlp.gate_up_proj
    piece = named["model.layers.0.mlp.1.w1"]
    assert piece.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()
    assert named["later.a"] is model.origin.passthrough["later.a"]
    assert "model.embed_tokens.weight" in named and "lm_head.weight" not in named  # tied
    before = checkpoint.digest(named, network.config.to_dict(), None, {})
    with torch.no_grad():
        stack[1, 0, 0] += 1
    assert checkpoint.digest(checkpoint.named_tensors(network), network.config.to_dict(), None,
                             {}) != before


@pytest.mark.parametrize(("change", "says"), [
    (lambda t: t.pop("model.layers.1.mlp.2.w3"), "missing model.layers.1.mlp.2.w3"),
    (lambda t: t.update({"model.layers.1.mlp.4.w1": torch.ones(48, 32)}),
     "unexpected model.layers.1.mlp.4.w1"),
    (lambda t: t.update({"model.layers.0.mlp.3.w2": torch.ones(48, 32)}),
     "wrong shape: model.layers.0.mlp.3.w2 is [48, 32] instead of [32, 48]"),
    (lambda t: t["model.layers.0.mlp.3.w2"].view(-1)[5:7].fill_(float("nan")),
     "tensor model.layers.0.mlp.3.w2: 2 of 1,536 values are NaN"),
])
def test_faults_name_the_tensors_of_the_files(network, tmp_path, change, says):
    checkpoint.Checkpoint(network).save(tmp_path / "m")
    rewrite(tmp_path / "m", change)
    fails(tmp_path / "m", says)


def test_stacked_experts_are_read_too(network, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delitem(ARCHITECTURES, "vicugna")
        checkpoint.Checkpoint(network).save(tmp_path / "m")
    read = checkpoint.read(tmp_path / "m").network
    assert torch.equal(read.model.layers[1].mlp.down_proj, network.model.layers[1].mlp.down_proj)


@pytest.mark.parametrize("experts", [10**9, 99])
def test_names_of_absurdly_many_experts_are_never_made(network, tmp_path, monkeypatch, experts):
    checkpoint.Checkpoint(network).save(tmp_path / "m")
    monkeypatch.setattr(Names, "of_experts", lambda self, name, count: pytest.fail("made"))
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts": experts}))
    fails(tmp_path / "m", "num_experts is 1,000,000,000" if experts > 99 else "do not fit")


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16]), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_any_stack_survives(tmp_path_factory, count, rows, columns, dtype, random):
    folder = tmp_path_factory.mktemp("stack")
    whole = torch.randn(count, rows, columns).to(dtype)
    weights.write(folder, {f"p{n}": part for n, part in enumerate(whole)})
    found = list(weights.scan([folder / weights.SINGLE]).values())
    random.shuffle(order := list(range(count)))
    parts = [next(t for t in found if t.name == f"p{n}") for n in order]
    read = Mapped().read(parts, (count, rows, columns), dtype, torch.device("cpu"))
    assert torch.equal(read, whole[order])


# Pass-through tensors.

def test_pass_through_tensors_come_back_bit_for_bit(model, tmp_path):
    model.save(tmp_path / "m")
    read = checkpoint.read(tmp_path / "m", torch.bfloat16)
    for name, tensor in model.origin.passthrough.items():
        again = read.origin.passthrough[name]
        assert again.dtype == tensor.dtype
        assert raw_bytes(again) == raw_bytes(tensor)
    assert not any(name.startswith("later") for name in read.network.state_dict())
    read.save(tmp_path / "again")
    assert torch.equal(stored(tmp_path / "again")["later.a"], model.origin.passthrough["later.a"])
    assert checkpoint.read(tmp_path / "again", torch.bfloat16).digest == read.digest
    before = read.digest
    del read.origin.passthrough["later.b"]
    assert read.digest != before


def test_the_digest_of_a_model_covers_pass_through_tensors(model):
    before = model.digest
    model.origin.passthrough["later.b"][0] = 2
    assert model.digest != before


def test_another_network_takes_over_what_came_with_the_first(model, tmp_path):
    trained = models.build(OURS)
    models.initialise(trained, 1)
    other = model.with_network(trained)
    other.save(tmp_path / "m")
    assert other.digest == checkpoint.read(tmp_path / "m").digest != model.digest
    assert torch.equal(stored(tmp_path / "m")["later.a"], model.origin.passthrough["later.a"])


# FP8.

def quantise(tensor: torch.Tensor, block) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 values and their scales, one for each block; edges may cut blocks off."""
    rows, columns = (-(-size // step) for size, step in zip(tensor.shape, block, strict=True))
    scale = torch.empty(rows, columns)
    values = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            at = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scale[i, j] = tensor[at].abs().max() / 448
            values[at] = (tensor[at] / scale[i, j]).to(torch.float8_e4m3fn)
    return values, scale


def reference(values: torch.Tensor, scale: torch.Tensor, block) -> torch.Tensor:
    """DeepSeek's weight_dequant, element by element: float32 value times the scale of its block."""
    wide = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return values.float() * wide[: values.shape[0], : values.shape[1]]


def quantised(folder: Path, block, **config) -> dict[str, torch.Tensor]:
    """A llama in `folder` with its projections in FP8; what they should be read as."""
    save("llama", folder, torch.bfloat16)
    due = {}

    def change(tensors):
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            tensors[name], tensors[name + "_scale_inv"] = quantise(tensors[name].float(), block)
            due[name] = reference(tensors[name], tensors[name + "_scale_inv"], block)

    rewrite(folder, change)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {
        "quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic",
        "fmt": "e4m3", **config}}))
    return due


@pytest.mark.parametrize("block", [(128, 128), (16, 16), (5, 7), (1, 100)])
def test_fp8_is_read_in_the_dtype_asked_for(tmp_path, block):
    due = quantised(tmp_path / "m", block)
    for dtype in (torch.float32, torch.bfloat16, None):
        state = checkpoint.read(tmp_path / "m", dtype).network.state_dict()
        assert {t.dtype for t in state.values()} == {dtype or torch.bfloat16}
        for name, tensor in due.items():
            assert torch.equal(state[name], tensor.to(dtype or torch.bfloat16))
    checkpoint.read(tmp_path / "m").save(tmp_path / "w")
    assert "quantization_config" not in json.loads((tmp_path / "w" / "config.json").read_text())
    assert torch.equal(stored(tmp_path / "w")[name], due[name])


def test_fp8_as_transformers_dequantises_it(tmp_path):
    """At its own block size, where the sizes are multiples of it."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    quantised(tmp_path / "m", (16, 16))
    tensors = stored(tmp_path / "m")
    for name, tensor in checkpoint.read(tmp_path / "m").network.state_dict().items():
        if name + "_scale_inv" in tensors:
            theirs = Fp8Dequantize(None)._dequantize_one(
                tensors[name], tensors[name + "_scale_inv"], torch.float32)
            assert torch.equal(tensor, theirs)


def test_fp8_experts_and_pass_through_tensors(model, tmp_path):
    model.save(tmp_path / "m")
    name, spare, block = "model.layers.0.mlp.1.w3", "later.a", [20, 20]
    due = {}

    def change(tensors):
        for one in (name, spare):
            tensors[one], tensors[one + "_scale_inv"] = quantise(tensors[one].float(), block)
            due[one] = reference(tensors[one], tensors[one + "_scale_inv"], block)

    rewrite(tmp_path / "m", change)
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {
        "quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}}))
    read = checkpoint.read(tmp_path / "m")
    assert torch.equal(read.network.model.layers[0].mlp.gate_up_proj[1].chunk(2)[1], due[name])
    assert torch.equal(read.origin.passthrough[spare], due[spare].bfloat16())
    assert read.origin.passthrough.keys() == model.origin.passthrough.keys()


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(("change", "says"), [
    (lambda t: t.pop(NAME + "_scale_inv"), "_scale_inv of shape [3, 2] scales it"),
    (lambda t: t.update({NAME + "_scale_inv": torch.ones(2, 2)}), "_scale_inv of shape [3, 2]"),
    (lambda t: t.update({NAME + "_scale_inv": torch.ones(3, 2).half()}), "no float32"),
    (lambda t: t.update({NAME: t[NAME].flatten()}), "scales it"),
    (lambda t: t.update({"x.weight_scale_inv": torch.ones(1)}), "unexpected x.weight_scale_inv"),
    (lambda t: t[NAME + "_scale_inv"].fill_(float("inf")), f"{NAME}: 1,5"),
    (lambda t: t[NAME].view(torch.uint8).view(-1)[:3].fill_(0x7F), f"{NAME}: 3 of 1,536 values"),
])
def test_broken_fp8(tmp_path, change, says):
    quantised(tmp_path / "m", (16, 16))
    rewrite(tmp_path / "m", change)
    fails(tmp_path / "m", says)


@pytest.mark.parametrize("config", [
    {"quant_method": "awq"}, {"quant_method": None}, {"weight_block_size": None},
    {"weight_block_size": [128]}, {"weight_block_size": [0, 128]},
    {"weight_block_size": [128, 2**40]}, {"weight_block_size": "ab"},
    {"activation_scheme": "static"},
])
def test_other_quantisations_are_refused(tmp_path, config):
    quantised(tmp_path / "m", (16, 16), **config)
    fails(tmp_path / "m", "quantised")


def test_fp8_without_a_quantization_config(tmp_path):
    quantised(tmp_path / "m", (16, 16))
    path = tmp_path / "m" / "config.json"
    content = json.loads(path.read_text())
    for how, says in ((None, "says nothing of FP8"), ("fp8", "quantised (fp8)"), ([], "quantised")):
        path.write_text(json.dumps({**content, "quantization_config": how}))
        fails(tmp_path / "m", says)


# Values that are not finite.

def test_large_weights_are_checked_by_the_first_forward_pass(tmp_path, monkeypatch):
    save("llama", tmp_path / "m")
    at_once = vicugna.load(tmp_path / "m").logits([[3, 4, 5]])
    monkeypatch.setattr(load, "AT_ONCE", 0)
    model = vicugna.load(tmp_path / "m")
    looked = mock.Mock(wraps=stored_tensors._check)
    monkeypatch.setattr(stored_tensors, "_check", looked)
    assert torch.equal(model.logits([[3, 4, 5]]), at_once)
    assert looked.call_count == len(stored(tmp_path / "m"))
    model.logits([[3]])
    assert looked.call_count == len(stored(tmp_path / "m"))
    rewrite(tmp_path / "m", lambda t: t["model.layers.1.mlp.up_proj.weight"][0, :2].fill_(
        float("nan")))
    model = vicugna.load(tmp_path / "m")
    for _ in range(2):  # it never runs
        with pytest.raises(VicugnaError, match=r"layers\.1\.mlp\.up_proj\.weight: 2 of 1,536 val"):
            model.logits([[3, 4, 5]])
    for use in (lambda: model.digest, lambda: model.save(tmp_path / "out")):
        with pytest.raises(VicugnaError, match=r"layers\.1\.mlp\.up_proj\.weight: 2 of 1,536 val"):
            use()
    assert not (tmp_path / "out").exists()
    fails(tmp_path / "m", "2 of 1,536 values", torch.bfloat16)  # what is converted is looked at


# Memory.

PEAKS = """
import sys, torch
from pathlib import Path
from vicugna import checkpoint
from vicugna.checkpoint.hf import weights
from vicugna.checkpoint.stored import Mapped

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

found = weights.scaled(weights.scan([Path(sys.argv[1])]), (128, 128))
for stem, dtype in (("plain", torch.bfloat16), ("plain", torch.float32), ("fp8", torch.bfloat16)):
    parts = [tensor for name, tensor in found.items() if name.startswith(stem)]
    shape = (len(parts), *parts[0].shape)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    whole = Mapped().read(parts, shape, dtype, torch.device("cpu"))
    print((memory("VmHWM") - before) / whole.nbytes)
    del whole
"""


def test_stacks_are_made_in_place(tmp_path):
    """Memory grows by the result and little more, while its file is as large or half as large."""
    one = torch.randn(1024, 2048)
    tensors = {f"plain{n}": one.bfloat16() for n in range(24)}
    for n in range(24):
        tensors[f"fp8{n}"] = one.to(torch.float8_e4m3fn)
        tensors[f"fp8{n}_scale_inv"] = torch.ones(8, 16)
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    ended = subprocess.run([sys.executable, "-c", PEAKS, str(tmp_path / "x.safetensors")],
                           check=True, capture_output=True, text=True)
    grown = list(map(float, ended.stdout.split()))
    assert len(grown) == 3 and all(0.9 < times < 1.3 for times in grown), grown
