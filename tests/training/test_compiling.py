"""Compiled layers: losses, gradients and names are those of eager ones."""

from __future__ import annotations

import shutil

import pytest
import torch
from kit import batch, network
from torch._dynamo.utils import counters

from vicugna.models.layers import flex
from vicugna.training.loss import Loss
from vicugna.training.objectives import next_token
from vicugna.training.parallel import compile_in_place, compile_layers

pytestmark = pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")),
                                reason="there is no compiler")


@pytest.mark.parametrize("kind", ["llama", "vicugna"])
def test_compiled_layers_compute_what_eager_ones_do(kind: str) -> None:
    """Within the noise of bfloat16, over several steps. The layers share what is compiled: there
    are more than the limit of recompilations, and later steps compile nothing."""
    torch.compiler.reset()
    eager, compiled = (network(kind, num_hidden_layers=9).train() for _ in range(2))
    names, graphs = list(compiled.state_dict()), list[int]()
    counters.clear()
    for layer in compiled.model.layers:
        compile_in_place(layer)
    assert list(compiled.state_dict()) == names
    for step in range(3):
        losses = [Loss(net, next_token, "bf16")(batch(step)) for net in (eager, compiled)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[0], losses[1], atol=0.05, rtol=1e-3)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[1] == graphs[2] < 20
    for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert float((p.grad - q.grad).abs().max()) < 0.05 * float(p.grad.abs().max()), name


def test_layers_are_compiled_on_gpus_only_and_in_training_only(monkeypatch: pytest.MonkeyPatch
                                                               ) -> None:
    net = network("llama")
    compile_layers(net, torch.device("cpu"))
    assert not any("forward" in vars(layer) for layer in net.model.layers)
    monkeypatch.setattr(torch, "compile", lambda forward: lambda *inputs: 1 / 0)
    for layer in net.model.layers:
        compile_in_place(layer)
    Loss(net.eval(), next_token, "fp32")(batch(0))
    with pytest.raises(ZeroDivisionError):
        Loss(net.train(), next_token, "fp32")(batch(0))


@pytest.mark.parametrize(("kind", "experts", "compiled"), [
    ("llama4_text", {"num_local_experts": 4, "interleave_moe_layer_step": 2}, [0, 2]),
    ("mixtral", {"num_local_experts": 4}, []), ("vicugna", {"num_experts": 4}, [])])
def test_layers_of_experts_are_left_out(kind: str, experts: dict[str, int], compiled: list[int],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "kernel", lambda device: object())
    net = network(kind, **experts)
    compile_layers(net, torch.device("cuda"))
    assert [n for n, layer in enumerate(net.model.layers) if "forward" in vars(layer)] == compiled
