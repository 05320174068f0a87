"""Qwen2 against transformers' Qwen2ForCausalLM on random weights."""

import parity
import pytest
import torch
from transformers import Qwen2Config

from vicugna import models
from vicugna.errors import VicugnaError

WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}


def config(**changes):
    return Qwen2Config(**{**parity.TINY, **changes})


CASES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},  # the small sizes
    "window from the second layer on": WINDOW,
    "window in every layer": {**WINDOW, "max_window_layers": 0},
    "window switched off": {**WINDOW, "use_sliding_window": False},
    "layers named": {**WINDOW, "layer_types": ["sliding_attention", "full_attention",
                                               "sliding_attention"]},
    "heads unlike the width": {"head_dim": 24},
    "every head its own": {"num_key_value_heads": 4},
    "yarn": parity.YARN,
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_logits_equal_transformers(changes):
    theirs, ours = parity.pair(config(**changes))
    parity.agree(theirs, ours, parity.random_tokens(3, 40))


def test_every_bias_counts():
    theirs, ours = parity.pair(config())
    tokens = parity.random_tokens(1, 20)
    biases = {name for name, _ in ours.named_parameters() if "bias" in name}
    assert {name.split(".")[-2] for name in biases} == {"q_proj", "k_proj", "v_proj"}
    with torch.no_grad():
        theirs.model.layers[1].self_attn.v_proj.bias += 0.1
    with pytest.raises(AssertionError, match="differs"):
        parity.agree_uncached(theirs, ours, tokens)
    parity.agree_uncached(theirs, parity.converted(theirs), tokens)


@pytest.mark.parametrize("first", [8190, 32760, 131000])
def test_far_positions_equal_transformers(first):
    theirs, ours = parity.pair(config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    parity.agree_uncached(theirs, ours, parity.random_tokens(1, 30), first)
    parity.agree_cached(theirs, ours, parity.random_tokens(1, 30), [13, 1, 16], first)


@pytest.mark.parametrize("changes", [{}, {**WINDOW, "tie_word_embeddings": True}])
def test_gradients_equal_transformers(changes):
    theirs, ours = parity.pair(config(**changes))
    parity.agree_gradients(theirs, ours, parity.random_tokens(2, 40))


@pytest.mark.parametrize("case", ["plain", "tied", "window from the second layer on",
                                  "window switched off", "layers named", "yarn"])
def test_round_trip(case, tmp_path):
    parity.agree_round_trip(parity.reference(config(**CASES[case])), tmp_path)


def test_layers_named_for_a_window_that_is_off():
    wrong = {**parity.TINY, **CASES["layers named"], "use_sliding_window": False}
    with pytest.raises(VicugnaError, match="sliding_window"):
        models.build({"model_type": "qwen2", **wrong})
