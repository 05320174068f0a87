"""The loss against plain cross-entropy, the optimisers, schedules, and what a step costs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import batch, network
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vicugna import chips, memory
from vicugna.errors import VicugnaError
from vicugna.models.counts import count
from vicugna.models.layers.attention import Dense
from vicugna.training import cost, logprobs, optimisers
from vicugna.training.batch import TrainingBatch
from vicugna.training.logprobs import token_logprobs
from vicugna.training.loss import Loss
from vicugna.training.objectives import next_token
from vicugna.training.recipe import OptimiserSpec


def full_logits(x: torch.Tensor, head: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(x @ head.T, target, reduction="none")


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 40), chunk=st.integers(1, 17), seed=st.integers(0, 10**6))
def test_logprobs_and_gradients_are_those_of_full_logits(n: int, chunk: int, seed: int) -> None:
    """Recomputed in the backward pass, or made in the forward pass for a loss that is linear."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=random)
    head = torch.randn(11, 6, generator=random)
    target = torch.randint(11, (n,), generator=random)
    weight = 0.1 + torch.rand(n, generator=random)
    ways: list[Any] = [full_logits, lambda *a: token_logprobs(*a, torch.float32),
                       lambda *a: token_logprobs(*a, torch.float32, -weight)]
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "CHUNK", chunk)
        for way in ways:
            leaves = [x.clone().requires_grad_(), head.clone().requires_grad_()]
            value = way(*leaves, target)
            (-3 * (value * weight).sum()).backward()
            results.append([value, *(leaf.grad for leaf in leaves)])
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], atol=2e-4, rtol=1e-4)


def test_without_gradients_none_are_made() -> None:
    x, head, target = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True), torch.ones(3)
    with torch.no_grad():
        assert not token_logprobs(x, head, target.long(), torch.float32, target).requires_grad


@dataclass
class Pairs(TrainingBatch):
    """Rows 2n and 2n + 1 are a chosen and a rejected reply; `reference_BT` are log-probabilities
    of the reference model."""

    reference_BT: torch.Tensor | None = None


def dpo(logprobs_BT: torch.Tensor, batch: Pairs) -> torch.Tensor:
    """Rafailov et al., arXiv 2305.18290, eq. 7, beta 0.1."""
    ratio_B = ((logprobs_BT - batch.reference_BT) * batch.weights_BT).sum(1)
    return -F.logsigmoid(0.1 * (ratio_B[0::2] - ratio_B[1::2])).sum()


def test_a_preference_loss_is_one_function() -> None:
    """DPO on the primitive against its formula on full logits, gradients included."""
    policy, other, reference = network(), network(), network(seed=1)
    b = Pairs(**vars(batch(0)))
    b.weights_BT = (b.weights_BT > 0).float()

    def full(net: nn.Module) -> torch.Tensor:
        logits: Any = net.lm_head(net(b.tokens_BT, b.positions_BT, Dense(b.positions_BT)))  # type: ignore[operator]
        logp = logits.log_softmax(-1).gather(-1, b.targets_BT[..., None])[..., 0]
        return (logp * b.weights_BT).sum(1)

    with torch.no_grad():
        b.reference_BT = Loss(reference, lambda logp, _: logp, "fp32")(b)
        expected_reference = full(reference)
    margin = full(other) - expected_reference
    due = -F.logsigmoid(0.1 * (margin[0::2] - margin[1::2])).sum()
    got = Loss(policy, dpo, "fp32")(b)
    (2 * got).backward()
    (2 * due).backward()
    torch.testing.assert_close(got, due)
    for (name, p), q in zip(policy.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_the_objective_reaches_every_parameter(tied: bool) -> None:
    """Value and gradients through the network equal those of whole logits."""
    one, two = (network(tie_word_embeddings=tied) for _ in range(2))
    b = batch(0)
    got = Loss(one, next_token, "fp32")(b)
    logits: Any = two.lm_head(two(b.tokens_BT, b.positions_BT, Dense(b.positions_BT)))
    due = (F.cross_entropy(logits.transpose(1, 2), b.targets_BT, reduction="none")
           * b.weights_BT).sum()
    got.backward()
    due.backward()
    torch.testing.assert_close(got, due)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_bf16_is_near() -> None:
    net, b = network(), batch(0)
    with torch.no_grad():
        values = [float(Loss(net, next_token, kind)(b)) for kind in ("fp32", "bf16")]
    assert values[0] == pytest.approx(values[1], rel=0.01)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("model", ["llama", "vicugna", "mixture"])
def test_every_parameter_has_exactly_one_optimiser(kind: str, model: str) -> None:
    net = (network("vicugna", num_experts=4) if model == "mixture" else
           network(model, tie_word_embeddings=model == "vicugna"))
    made = optimisers.build(net, OptimiserSpec(kind=kind, weight_decay=0.1))
    held = [p for opt in made for group in opt.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(id(p) for p in net.parameters())
    if kind == "muon":
        muon = {id(p) for p in made[1].param_groups[0]["params"]}
        names = {name for name, p in net.named_parameters() if id(p) in muon}
        assert names and all("_proj" in name and "embed" not in name for name in names)
    for opt in made:
        for group in opt.param_groups:
            assert (group["weight_decay"] > 0) == (group["params"][0].ndim >= 2)


def test_batched_muon_is_torchs_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimisers, "STACK", 5000)  # two matrices of a shape, then the third
    shapes = [(48, 48), (128, 16), (16, 128)] * 3
    random, ends = torch.Generator().manual_seed(0), []
    initial = [torch.randn(shape, generator=random) for shape in shapes]
    for kind in (torch.optim.Muon, optimisers.Muon):
        parameters = [nn.Parameter(one.clone()) for one in initial]
        optimiser = kind(parameters, lr=0.02, weight_decay=0.1)
        for step in range(3):
            random.manual_seed(step)
            for p in parameters[step == 1:]:  # the first has no gradient once
                p.grad = torch.randn(p.shape, generator=random)
            optimiser.step()
            optimiser.zero_grad()
        ends.append(parameters)
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


@given(schedule=st.sampled_from(["wsd", "cosine"]), steps=st.integers(1, 300),
       warmup=st.integers(0, 400), decay=st.floats(0.01, 1), final=st.floats(0, 1))
def test_schedules(schedule: Any, steps: int, warmup: int, decay: float, final: float) -> None:
    spec = OptimiserSpec(schedule=schedule, warmup=warmup, decay=decay, final=final)
    shares = [optimisers.factor(spec, step, steps) for step in range(steps)]
    assert all(0 <= share <= 1 + 1e-9 for share in shares)
    assert shares[0] > 0 or final == 0
    after = shares[warmup:]
    assert all(b <= a + 1e-9 for a, b in pairwise(after))
    if warmup < steps:
        assert shares[-1] >= final - 1e-9


def test_a_schedule_in_figures() -> None:
    spec = OptimiserSpec(schedule="wsd", warmup=2, decay=0.5, final=0.0)
    assert [optimisers.factor(spec, step, 8) for step in range(8)] == [
        0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    cosine = OptimiserSpec(schedule="cosine", warmup=0, final=0.1)
    assert optimisers.factor(cosine, 0, 10) == 1
    assert optimisers.factor(cosine, 5, 10) == pytest.approx(0.55)


@pytest.mark.parametrize(("kind", "shape"), [
    ("llama", {}), ("vicugna", {"sliding_window": 64}), ("vicugna", {"num_experts": 4})])
def test_flops_are_near_what_torch_counts(kind: str, shape: dict[str, int]) -> None:
    """Within 15%: the masked half of attention, which is computed, is not counted."""
    net = network(kind, hidden_size=64, intermediate_size=160, head_dim=32, **shape)
    grouped: Any = {  # products that the counter does not know: experts' rows, each in one of them
        torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * prod(a) * b[-1]}
    b, counted = batch(0, T=32), FlopCounterMode(display=False, custom_mapping=grouped)
    with counted:
        hidden = net(b.tokens_BT, b.positions_BT, Dense())
        net.lm_head(hidden).sum().backward()
    due = counted.get_total_flops() / b.tokens_BT.numel()
    config: Any = net.config
    assert 3 * count(config.to_dict()).flops(32) == pytest.approx(due, rel=0.15)


def test_memory_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    fits = cost.training_memory(net, 8, 16, 4)
    assert cost.training_memory(net, 8, 16, 4, shards=2) < fits - 7 * sum(
        p.numel() for p in net.parameters())
    monkeypatch.setattr(memory, "available_memory", lambda: fits)
    cost.check_memory(net, 8, 16, 4, "pretrain")
    with pytest.raises(VicugnaError, match=r"1000000 rows of 16 tokens.*micro_rows to \d+") as e:
        cost.check_memory(net, 1_000_000, 16, 4, "pretrain")
    rows = int(e.value.fix.split("micro_rows to ")[1].split(",")[0])
    assert 4 <= rows <= 8
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    with pytest.raises(VicugnaError, match="million parameters"):
        cost.check_memory(net, 4, 16, 4, "pretrain")
    monkeypatch.setattr(memory, "available_memory", lambda: cost.training_memory(net, 0, 16, 4) + 9)
    with pytest.raises(VicugnaError, match="Even one row does not fit"):
        cost.check_memory(net, 4, 16, 4, "pretrain")


@pytest.mark.parametrize(("name", "published"), [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", None), ("Tesla K80", None)])
def test_utilisation_is_of_the_published_peak_where_it_is_known(
        name: str, published: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert cost.peaks("bf16", torch.device("cuda:0")) == {
        "matmul_utilisation": 1e9, **({"mfu": published} if published else {})}
    assert cost.peaks("bf16", torch.device("cpu")) == {"matmul_utilisation": 1e9}


def test_the_peak_memory_of_a_gpu_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.peak_memory().keys() == {"peak_memory_bytes"}
    for name, value in {"is_available": True, "is_initialized": True,
                        "max_memory_allocated": 7}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert memory.peak_memory()["peak_device_memory_bytes"] == 7


def test_every_device_is_a_gpu_with_figures() -> None:
    assert len(chips.DEVICES) == len(chips.GPUS)
    for gpu in chips.DEVICES.values():
        assert gpu.peak("bf16") > gpu.peak("fp32") > 0
