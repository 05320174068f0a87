"""The training loop: exact resume, accumulation, losses that are not finite, experts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kit import VOCAB, batch, network, spec, stopping_at
from torch import nn

from vicugna.distributed import Ranks
from vicugna.errors import VicugnaError
from vicugna.models.layers.moe import MoE
from vicugna.training import trainer
from vicugna.training.batch import TrainingBatch, padding
from vicugna.training.loss import Loss
from vicugna.training.metrics import Metrics
from vicugna.training.objectives import next_token
from vicugna.training.recipe import TrainSpec
from vicugna.training.trainer import Batches, Validate, balance_experts

ONE_PROCESS = Ranks()
TIMES = ("tokens_per_second", "matmul_utilisation")


def train(net: nn.Module, batches: Batches, stage: TrainSpec, folder: Path, where: str = "t",
          validate: Validate | None = None) -> dict[str, Any]:
    return trainer.train(net, next_token, batches, stage, folder, where, ONE_PROCESS, validate)


def bytes_of(net: nn.Module) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in net.state_dict().items()}


def figures(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def validation(module: nn.Module, step: int) -> dict[str, float]:
    with torch.no_grad():
        return {"validation_loss": float(module(batch(1000)))}


MIXED = {"num_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(("kind", "shape"), [("muon", {}), ("adamw", {}), ("muon", MIXED)])
def test_a_killed_training_ends_in_the_same_bytes(kind: str, shape: dict[str, int],
                                                  tmp_path: Path) -> None:
    stage = spec(optimiser={"kind": kind, "weight_decay": 0.1})
    expected = network(**shape)
    cost = train(expected, batch, stage, tmp_path / "expected", validate=validation)
    for stop in (2, 5, 7):  # before the first checkpoint, between two, after the last
        with pytest.raises(KeyboardInterrupt):
            train(network(**shape), stopping_at(stop), stage, tmp_path / "killed",
                  validate=validation)
        with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
            file.write('{"step": 9')  # a torn line
    again = network(**shape)
    cost_again = train(again, batch, stage, tmp_path / "killed", validate=validation)
    assert bytes_of(again) == bytes_of(expected)
    assert figures(tmp_path / "killed") == figures(tmp_path / "expected")
    assert [row["step"] for row in figures(tmp_path / "killed")] == list(range(8))
    assert (cost_again["tokens"], cost_again["flops"]) == (cost["tokens"], cost["flops"])
    if shape:
        layer = next(m for m in again.modules() if isinstance(m, MoE))
        assert layer.expert_bias.abs().max() > 0


def test_the_state_holds_every_moment(tmp_path: Path) -> None:
    """A state written and read gives optimisers the very tensors they had."""
    from vicugna.training import optimisers, state
    net, stage = network(**MIXED), spec()
    opts = optimisers.build(net, stage.optimiser)
    module = Loss(net, next_token, "fp32")
    for step in range(3):
        trainer._step(module, net, opts, batch(step), stage, ONE_PROCESS)
    progress = {"step": 3, "skipped": 1, "bad": 1, "tokens": 7, "seconds": 0.5, "flops": 2.0}
    state.save(tmp_path, module, opts, progress, ONE_PROCESS)
    other = network(seed=1, **MIXED)
    fresh = optimisers.build(other, stage.optimiser)
    assert state.load(tmp_path, Loss(other, next_token, "fp32"), fresh, ONE_PROCESS) == progress
    assert bytes_of(other) == bytes_of(net)
    for old, new in zip(opts, fresh, strict=True):
        assert len(new.state) == len(old.state) > 0
        for one, two in zip(old.state.values(), new.state.values(), strict=True):
            assert one.keys() == two.keys()
            assert all(torch.equal(one[key], two[key]) for key in one)
        for one, two in zip(old.param_groups, new.param_groups, strict=True):
            assert {**one, "params": 0} == {**two, "params": 0}


def test_validation_changes_nothing(tmp_path: Path) -> None:
    plain, watched = network(**MIXED), network(**MIXED)
    train(plain, batch, spec(), tmp_path / "a")
    train(watched, batch, spec(), tmp_path / "b", validate=validation)
    assert bytes_of(plain) == bytes_of(watched)


@pytest.mark.parametrize("micro", [1, 3])
def test_accumulated_gradients_are_those_of_the_whole_batch(micro: int, tmp_path: Path) -> None:
    whole, parts = network(**MIXED), network(**MIXED)
    adamw = {"kind": "adamw", "learning_rate": 1e-3}
    train(whole, batch, spec(optimiser=adamw), tmp_path / "a")
    train(parts, batch, spec(optimiser=adamw, micro_rows=micro), tmp_path / "b")
    for one, two in zip(figures(tmp_path / "a"), figures(tmp_path / "b"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    for (name, one), two in zip(whole.state_dict().items(), parts.state_dict().values(),
                                strict=True):
        torch.testing.assert_close(one, two, atol=2e-4, rtol=1e-3, msg=name)


def not_finite(step: int) -> TrainingBatch:
    return replace(batch(step), weights_BT=batch(step).weights_BT * float("inf"))


def test_a_loss_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    bad_steps = {2, 4}
    net = network()
    cost = train(net, lambda s: not_finite(s) if s in bad_steps else batch(s), spec(), tmp_path)
    assert cost["skipped"] == 2
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    rows = figures(tmp_path)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert {row["step"] for row in rows if row["loss"] is None} == bad_steps
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_skipped_step_leaves_the_weights(tmp_path: Path) -> None:
    from vicugna.training import optimisers
    net = network(**MIXED)
    before, stage = bytes_of(net), spec()
    opts = optimisers.build(net, stage.optimiser)
    trainer._step(Loss(net, next_token, "fp32"), net, opts, not_finite(0), stage, ONE_PROCESS)
    assert bytes_of(net) == before
    assert all(p.grad is None for p in net.parameters())


def test_a_token_without_an_embedding_is_named(tmp_path: Path) -> None:
    one = batch(0)
    one.targets_BT[2, 3] = VOCAB
    with pytest.raises(VicugnaError, match=rf"token {VOCAB}.* vocab_size is {VOCAB}"):
        train(network(), lambda step: one, spec(), tmp_path, "sft")


def test_rows_are_filled_with_a_token_that_has_an_embedding() -> None:
    for pad, due in ((7, 7), (VOCAB, 0)):  # the latter as in many descendants of Llama 2
        assert padding(SimpleNamespace(pad_id=pad), network()) == due  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [4, 30])
def test_a_loss_that_stays_broken_is_an_error(steps: int, tmp_path: Path) -> None:
    rates = {"learning_rate": 1e30, "muon_learning_rate": 1e30}
    with pytest.raises(VicugnaError, match=r"not finite for \d steps.*learning_rate"):
        train(network(), batch, spec(steps=steps, optimiser=rates), tmp_path, "pretrain")


def test_steps_that_failed_before_a_kill_count(tmp_path: Path) -> None:
    stage = spec(steps=40, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(network(), stopping_at(6, not_finite), stage, tmp_path)
    with pytest.raises(VicugnaError, match="8 steps in a row, the last being step 7"):
        train(network(), not_finite, stage, tmp_path)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(network(), stopping_at(5), spec(), tmp_path)
    for file in (tmp_path / "state").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(VicugnaError, match=r"state cannot be used.*Delete it"):
        train(network(), batch, spec(), tmp_path)


def test_a_kill_while_a_state_is_replaced_keeps_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(network(), stopping_at(5), spec(), tmp_path)
    (tmp_path / "state").rename(tmp_path / ".state.abcd_123.old")  # between the two renames
    (tmp_path / ".state.efgh4567.tmp").mkdir()
    seen: list[int] = []
    train(network(), lambda step: (seen.append(step), batch(step))[1], spec(), tmp_path)
    assert seen[0] == 3
    assert not list(tmp_path.glob(".state*"))


def test_metrics_are_cut_at_the_checkpoint(tmp_path: Path) -> None:
    whole = "".join(f'{{"step": {n}}}\n' for n in range(6))
    (tmp_path / "metrics.jsonl").write_text(whole + '{"st')
    metrics = Metrics(tmp_path, 4)
    metrics.write({"step": 4, "loss": float("nan")})
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[-1]["loss"] is None


def test_balancing_evens_the_load() -> None:
    torch.manual_seed(0)
    layer = MoE(8, 8, 4, 1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x_BTD = torch.randn(2, 256, 8) + torch.randn(8)  # a common direction: an uneven load

    def spread() -> float:
        layer.tokens_per_expert.zero_()
        layer(x_BTD)
        return float(layer.tokens_per_expert.max() - layer.tokens_per_expert.min())

    layer.train()
    first = spread()
    for _ in range(300):
        spread()
        balance_experts(layer, ONE_PROCESS, 2e-3)
    assert spread() < 0.3 * first
    layer.eval()
    before = layer.tokens_per_expert.clone()
    layer(x_BTD)
    assert torch.equal(layer.tokens_per_expert, before)  # only training counts


def test_bf16_trains(tmp_path: Path) -> None:
    net = network()
    train(net, lambda step: batch(0), spec(steps=30, precision="bf16"), tmp_path)
    rows = figures(tmp_path)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert {p.dtype for p in net.parameters()} == {torch.float32}
