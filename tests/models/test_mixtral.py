"""Mixtral against transformers' MixtralForCausalLM on random weights."""

import json

import parity
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig

import vicugna
from vicugna import models
from vicugna.errors import VicugnaError
from vicugna.training.batch import TrainingBatch
from vicugna.training.loss import Loss
from vicugna.training.objectives import next_token


def config(**changes):
    return MixtralConfig(**{**parity.TINY, "intermediate_size": 48, "head_dim": 16,
                            "num_local_experts": 4, **changes})


CASES = {
    "two of four": {},
    "one of four": {"num_experts_per_tok": 1},
    "all of three": {"num_local_experts": 3, "num_experts_per_tok": 3},
    "one expert": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "many experts": {"num_local_experts": 60, "num_experts_per_tok": 2},
    "window": {"sliding_window": 7},
    "heads unlike the width": {"head_dim": 24},
    "tied": {"tie_word_embeddings": True},
    "training's switches": {"router_jitter_noise": 0.1, "router_aux_loss_coef": 0.02},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_logits_equal_transformers(changes):
    theirs, ours = parity.pair(config(**changes))
    parity.agree(theirs, ours, parity.random_tokens(3, 40))


@pytest.mark.parametrize("first", [8190, 32760, 131000])
def test_far_positions_equal_transformers(first):
    theirs, ours = parity.pair(config(sliding_window=11))
    parity.agree_uncached(theirs, ours, parity.random_tokens(1, 30), first)
    parity.agree_cached(theirs, ours, parity.random_tokens(1, 30), [13, 1, 16], first)


@pytest.mark.parametrize("kind", ["all equal", "pairs equal"])
def test_ties_are_broken_as_transformers_breaks_them(kind):
    theirs = parity.reference(config(num_local_experts=8))
    with torch.no_grad():
        for layer in theirs.model.layers:
            gate = layer.mlp.gate.weight
            gate.copy_(torch.zeros_like(gate) if kind == "all equal" else
                       gate[:4].repeat_interleave(2, 0))
    ours = parity.converted(theirs)
    parity.agree_uncached(theirs, ours, parity.random_tokens(2, 30))
    parity.agree_gradients(theirs, ours, parity.random_tokens(2, 30))


@pytest.mark.parametrize("changes", [{}, {"num_local_experts": 60}, {"sliding_window": 7}])
def test_gradients_equal_transformers(changes):
    theirs, ours = parity.pair(config(**changes))
    parity.agree_gradients(theirs, ours, parity.random_tokens(2, 20))


def test_the_loss_with_balancing_equals_transformers():
    """Value and gradients of the whole training loss, padding left out of both parts."""
    theirs, ours = parity.pair(config(router_aux_loss_coef=0.5, output_router_logits=True,
                               vocab_size=97))
    tokens = parity.random_tokens(2, 21)
    lengths = torch.tensor([20, 13])
    real = torch.arange(20) < lengths[:, None]
    labels = torch.where(real, tokens[:, 1:], -100)
    theirs.train()
    out = theirs(tokens[:, :-1], attention_mask=real.long(), output_router_logits=True)
    due = cross_entropy(out.logits.flatten(0, 1), labels.flatten()) + 0.5 * out.aux_loss
    due.backward()
    ours.train()
    positions = torch.arange(20).expand(2, -1)
    batch = TrainingBatch(tokens[:, :-1], positions, labels.clamp(min=0), real.float())
    total = Loss(ours, next_token, "fp32")(batch)
    loss = total / real.sum()
    loss.backward()
    assert 0.5 * out.aux_loss > 0.4  # a part that would be missed
    torch.testing.assert_close(loss, due, atol=1e-5, rtol=1e-5)
    for n, layer in enumerate(theirs.model.layers):
        mine = ours.model.layers[n].block_sparse_moe
        for got, expected in ((mine.gate.weight, layer.mlp.gate.weight),
                              (mine.experts.gate_up_proj, layer.mlp.experts.gate_up_proj)):
            torch.testing.assert_close(got.grad, expected.grad, atol=1e-5, rtol=1e-4)
    ours.eval()
    total = Loss(ours, next_token, "fp32")(batch)
    plain = cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(total / real.sum(), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["two of four", "window", "tied", "training's switches"])
def test_round_trip(case, tmp_path):
    parity.agree_round_trip(parity.reference(config(**CASES[case])), tmp_path)


def test_the_files_have_the_published_names(tmp_path):
    theirs = parity.reference(config())
    vicugna.Model(parity.converted(theirs)).save(tmp_path)
    names = parity.tensors_of(tmp_path).keys()
    assert {name for name in names if name.startswith("model.layers.0.block_sparse_moe.")} == {
        "model.layers.0.block_sparse_moe.gate.weight",
        *(f"model.layers.0.block_sparse_moe.experts.{e}.w{w}.weight"
          for e in range(4) for w in (1, 2, 3))}
    assert json.loads((tmp_path / "config.json").read_text())["num_local_experts"] == 4


BAD = {
    "too many": ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
    "none": ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
    "no experts": ({"num_local_experts": 0}, "num_local_experts"),
    "window": ({"sliding_window": 0}, "sliding_window is 0"),
    "type": ({"num_local_experts": 2.5}, "num_local_experts"),
}


@pytest.mark.parametrize("changes,words", BAD.values(), ids=BAD)
def test_impossible_configs_are_named(changes, words):
    with pytest.raises(VicugnaError, match=words):
        models.build({"model_type": "mixtral", **parity.TINY, **changes})
