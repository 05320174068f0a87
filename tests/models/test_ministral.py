"""Ministral and Ministral 3 against transformers on random weights."""

import parity
import pytest
import torch
from test_mistral3 import MINISTRAL
from transformers import Ministral3Config, MinistralConfig

import vicugna
from vicugna import models
from vicugna.errors import VicugnaError

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def third(**changes):
    return Ministral3Config(**{**parity.TINY, "head_dim": 16, **{
        key: value for key, value in MINISTRAL.items() if key != "model_type"}, **changes})


def first(**changes):
    return MinistralConfig(**{**parity.TINY, "head_dim": 16, "sliding_window": 7, **changes})


CASES = {
    "ministral": (first, {}), "two kinds of layers": (first, {"layer_types": MIXED}),
    "ministral 3": (third, {}), "ministral 3 with a window": (third, {"sliding_window": 7}),
    "ministral 3, tied": (third, {"tie_word_embeddings": True}),
    "ministral 3 as it is by default": (third, {"rope_parameters": None}),
}


def config(case):
    make, changes = CASES[case]
    return make(**changes)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    theirs, ours = parity.pair(config(case))
    parity.agree(theirs, ours, parity.random_tokens(3, 40))


@pytest.mark.parametrize("start", [16370, 32760, 131000])
def test_far_positions_equal_transformers(start):
    """Beyond the original context of 16,384, where queries sharpen."""
    theirs, ours = parity.pair(config("ministral 3 as it is by default"))
    parity.agree_uncached(theirs, ours, parity.random_tokens(1, 30), start)
    parity.agree_cached(theirs, ours, parity.random_tokens(1, 30), [13, 1, 16], start)


@pytest.mark.parametrize("case", ["two kinds of layers", "ministral 3"])
def test_gradients_equal_transformers(case):
    theirs, ours = parity.pair(config(case))
    parity.agree_gradients(theirs, ours, parity.random_tokens(2, 40))


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case, tmp_path):
    parity.agree_round_trip(parity.reference(config(case)).to(torch.bfloat16), tmp_path)
    assert vicugna.load(tmp_path / "ours").config.to_dict()["model_type"] == config(case).model_type


@pytest.mark.parametrize("rope", [
    {"rope_type": "default", "rope_theta": 1e6, "llama_4_scaling_beta": 0.1,
     "original_max_position_embeddings": 16},
    {key: value for key, value in MINISTRAL["rope_parameters"].items()
     if key != "llama_4_scaling_beta"},
    {**MINISTRAL["rope_parameters"], "llama_4_scaling_beta": "0.1"},
])
def test_other_ropes_of_ministral_3_are_refused(rope):
    with pytest.raises(VicugnaError, match="llama_4_scaling_beta"):
        models.build({"model_type": "ministral3", **parity.TINY, "rope_parameters": rope})
