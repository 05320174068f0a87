"""Products with packed weights, in every format and on every instruction set of this CPU."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

gguf = pytest.importorskip("gguf")
pytest.importorskip("numba")

from vicugna.engine.cpu import available, linear  # noqa: E402
from vicugna.engine.cpu.formats import FORMATS, Format  # noqa: E402
from vicugna.engine.cpu.instruction_set import SETS, chosen  # noqa: E402
from vicugna.errors import VicugnaError  # noqa: E402

BLOCKS = [kind for kind, form in FORMATS.items() if not form.is_float]


def raw_blocks(form: Format, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random blocks of GGUF with scales of a usual size, both signs."""
    raw = rng.integers(0, 256, (count, form.block_bytes)).astype(np.uint8)
    places = {"q6_k": [208]}.get(form.name, [0, 2] if form.minima else [0])
    for place in places:
        scale = (rng.standard_normal(count) / 100).astype(np.float16)
        raw[:, place : place + 2] = scale.view(np.uint8).reshape(-1, 2)
    return raw


def packed_and_weights(kind: str, N: int, K: int, seed: int) -> tuple[linear.Packed, torch.Tensor]:
    """A random matrix, packed, and its weights by the package gguf."""
    form = FORMATS[kind]
    if form.is_float:
        weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        return linear.pack(weight, kind), weight.to(dtype).float()
    raw = raw_blocks(form, N * K // form.columns, np.random.default_rng(seed))
    weights = gguf.quants.dequantize(raw.reshape(N, -1), gguf.GGMLQuantizationType[kind.upper()])
    return linear.from_gguf(kind, raw, (N, K)), torch.from_numpy(weights)


def check(kind: str, N: int, groups: int, M: int, seed: int) -> None:
    """A product with a random matrix is near the exact one, and its rows do not know each other."""
    K = groups * (1 if FORMATS[kind].is_float else 32)
    K = -(-K // FORMATS[kind].columns) * FORMATS[kind].columns
    packed, weight = packed_and_weights(kind, N, K, seed)
    assert torch.equal(linear.rows(packed, torch.arange(N)), weight)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(seed + 1))
    bias = torch.randn(N, generator=torch.Generator().manual_seed(seed + 2))
    y = linear.matmul(x, packed, bias)
    exact = x.double() @ weight.double().T + bias
    size = x.abs().double() @ weight.abs().double().T + bias.abs()
    # Activations in int8: each is off by at most half a step of 1/127 of its group's largest, and
    # that step is float16.
    limit = 1e-5 if FORMATS[kind].is_float else (0.5 / 127 + 2**-11) * float(x.abs().max())
    columns = torch.ones_like(x).double() @ weight.abs().double().T
    assert bool(((y - exact).abs() <= limit * columns + 1e-5 * size).all())
    for rows in ([M - 1], [0, M // 2], range(M // 3, M)):
        assert torch.equal(linear.matmul(x[list(rows)], packed, bias), y[list(rows)])


def test_kernels_run_here() -> None:
    assert available()


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=12, deadline=None)
@given(N=st.integers(1, 80), groups=st.integers(1, 20), M=st.integers(1, 40),
       seed=st.integers(0, 1000))
def test_products_are_right_and_rows_alone_have_the_same_bits(
        kind: str, N: int, groups: int, M: int, seed: int) -> None:
    check(kind, N, groups, M, seed)


def test_every_instruction_set_gives_the_same_bits() -> None:
    """What each forced set computes, in a process of its own, is what this process computes."""
    script = "import test_cpu_linear as t; print(t.digest())"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    others = [found.name for found in SETS if found.runs_here() and found is not chosen()]
    running = {name: subprocess.Popen(
        [sys.executable, "-c", script], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "VICUGNA_CPU": name, "PYTHONPATH": path}) for name in others}
    ended = {name: process.communicate() for name, process in running.items()}
    assert {name: out.split() or errors for name, (out, errors) in ended.items()} == dict.fromkeys(
        others, digest().split())


def digest() -> str:
    """Numbers for the results of a few formats."""
    results = []
    for kind in ("bf16", "q8_0", "q6_k"):  # floats, and codes above and below 128
        packed, _ = packed_and_weights(kind, 48, 512, 3)
        x = torch.randn(13, 512, generator=torch.Generator().manual_seed(4))
        results.append(linear.matmul(x, packed).view(torch.int32).sum())
    return " ".join(str(int(number)) for number in results)


@pytest.mark.parametrize("kind", linear.QUANTISERS)
def test_quantised_as_llama_cpp_does(kind: str) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(linear.QUANTISERS[kind](weight), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_have_the_dtype_of_activations(dtype: torch.dtype) -> None:
    packed, _ = packed_and_weights("bf16", 32, 64, 0)
    x = torch.randn(2, 64).to(dtype)
    y = linear.matmul(x, packed)
    assert y.dtype == dtype
    assert torch.equal(y, linear.matmul(x.float(), packed).to(dtype))


@pytest.mark.parametrize("kind", BLOCKS)
def test_what_is_not_a_number_is_seen(kind: str) -> None:
    packed, _ = packed_and_weights(kind, 16, 256, 0)
    x = torch.randn(2, 256)
    x[1, 40] = float("nan")
    y = linear.matmul(x, packed)
    assert bool(y[0].isfinite().all())
    assert bool(y[1].isnan().all())


def test_errors_say_what_to_do() -> None:
    with pytest.raises(VicugnaError, match="Did you mean 'q4_0'"):
        linear.pack(torch.zeros(16, 32), "q40")
    with pytest.raises(VicugnaError, match="no multiple of 32"):
        linear.pack(torch.zeros(16, 33), "q8_0")
    with pytest.raises(VicugnaError, match="not quantised to q6_k"):
        linear.pack(torch.zeros(16, 256), "q6_k")
    with pytest.raises(VicugnaError, match="bytes are not 16 x 32"):
        linear.from_gguf("q8_0", np.zeros(5, np.uint8), (16, 32))
    with pytest.raises(VicugnaError, match="width 31"):
        linear.matmul(torch.zeros(1, 31), linear.pack(torch.zeros(16, 32), "f32"))
    with pytest.raises(VicugnaError, match="row 16 of 16"):
        linear.rows(linear.pack(torch.zeros(16, 32), "f32"), torch.tensor([16]))
