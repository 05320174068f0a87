"""The loss against plain cross-entropy, the optimisers, schedules, and what a step costs."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import batch, network
from torch.utils.flop_counter import FlopCounterMode

from vicugna.errors import VicugnaError
from vicugna.models.layers.attention import Dense
from vicugna.training import cost, loss, optimisers
from vicugna.training.loss import Objective, _WeightedNLL
from vicugna.training.recipe import OptimiserSpec


def plain(x: torch.Tensor, head: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
          ) -> torch.Tensor:
    return (F.cross_entropy(x @ head.T, target, reduction="none") * weight).sum()


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 40), chunk=st.integers(1, 17), seed=st.integers(0, 10**6))
def test_the_loss_is_cross_entropy(n: int, chunk: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=random, dtype=torch.float64)
    head = torch.randn(11, 6, generator=random, dtype=torch.float64)
    target = torch.randint(11, (n,), generator=random)
    weight = torch.randn(n, generator=random) * (torch.rand(n, generator=random) < 0.7)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK", chunk)
        for function in (lambda *a: _WeightedNLL.apply(*a, torch.float32), plain):
            leaves = [x.float().requires_grad_(), head.float().requires_grad_()]
            value = function(*leaves, target, weight)
            (3 * value).backward()
            results.append([value, *(leaf.grad for leaf in leaves)])
    for got, due in zip(*results, strict=True):
        torch.testing.assert_close(got, due, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_the_objective_reaches_every_parameter(tied: bool) -> None:
    """Value and gradients through the network equal those of whole logits."""
    one, two = (network(tie_word_embeddings=tied) for _ in range(2))
    b = batch(0)
    got = Objective(one, "fp32")(b.tokens_BT, b.positions_BT, b.targets_BT, b.weights_BT)
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
        values = [float(Objective(net, kind)(b.tokens_BT, b.positions_BT, b.targets_BT,
                                             b.weights_BT)) for kind in ("fp32", "bf16")]
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
    assert cost.flops_per_token(net, 32) == pytest.approx(due, rel=0.15)


def test_memory_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    fits = cost.training_memory(net, 8, 16, 4)
    monkeypatch.setattr(cost, "available_memory", lambda: fits)
    cost.check_memory(net, 8, 16, 4, "pretrain")
    with pytest.raises(VicugnaError, match=r"1000000 rows of 16 tokens.*micro_rows to \d+") as e:
        cost.check_memory(net, 1_000_000, 16, 4, "pretrain")
    rows = int(e.value.fix.split("micro_rows to ")[1].split(",")[0])
    assert 4 <= rows <= 8
    monkeypatch.setattr(cost, "available_memory", lambda: 1000)
    with pytest.raises(VicugnaError, match="Even one row does not fit"):
        cost.check_memory(net, 4, 16, 4, "pretrain")
