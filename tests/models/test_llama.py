"""Llama against transformers' LlamaForCausalLM on random weights."""

import parity
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from vicugna import models
from vicugna.errors import VicugnaError
from vicugna.models.layers.attention import Dense

LLAMA3_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def config(**changes):
    return LlamaConfig(**{**parity.TINY, **changes})


CASES = {
    "grouped": {},
    "every head its own": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 32},
    "llama3 rope": {"rope_parameters": {**LLAMA3_SCALING, "rope_theta": 500000.0}},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0,
                                        "rope_theta": 10000.0}},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_logits_equal_transformers(changes):
    theirs, ours = parity.pair(config(**changes))
    parity.agree(theirs, ours, parity.random_tokens(3, 300))


@pytest.mark.parametrize("case", ["grouped", "llama3 rope", "linear rope"])
@pytest.mark.parametrize("first", [8190, 32760, 131000])
def test_far_positions_equal_transformers(case, first):
    theirs, ours = parity.pair(config(**CASES[case]))
    parity.agree_uncached(theirs, ours, parity.random_tokens(1, 30), first)
    parity.agree_cached(theirs, ours, parity.random_tokens(1, 30), [13, 1, 16], first)


@pytest.mark.parametrize("case", ["tied", "biases", "llama3 rope"])
def test_gradients_and_round_trip(case, tmp_path):
    theirs, ours = parity.pair(config(**CASES[case]))
    parity.agree_round_trip(theirs, tmp_path)
    parity.agree_gradients(theirs, ours, parity.random_tokens(2, 50))


def test_old_rope_keys_mean_the_same():
    _, ours = parity.pair(config(**CASES["llama3 rope"]))
    old = {**ours.config.to_dict(), "rope_parameters": None}
    assert old["rope_scaling"]["rope_type"] == "llama3" and old["rope_theta"] == 500000.0
    assert models.build(old).config == ours.config


@pytest.mark.parametrize("architecture", ["llama", "vicugna"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_packed_documents_equal_documents_alone(architecture, data):
    """Packing is invisible: a document in a packed row gets the logits it gets by itself."""
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    config = {"model_type": architecture, "vocab_size": 50, "hidden_size": 32,
              "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "sliding_window": data.draw(st.integers(1, 20)),
              "conv_width": data.draw(st.integers(1, 5)), "initializer_range": 0.2}
    network = models.build(config)
    models.initialise(network, seed=1)
    for name, parameter in network.named_parameters():
        if "conv" in name:
            torch.nn.init.normal_(parameter, 0, 0.5)
    tokens = torch.randint(0, 50, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = network(tokens, positions, Dense(positions)).split(lengths, dim=1)
        for part, document in zip(packed, tokens.split(lengths, dim=1), strict=True):
            alone = network(document, torch.arange(document.shape[1])[None], Dense())
            assert torch.allclose(part, alone, atol=2e-5)


BAD = {
    "model_type": ({"model_type": "lama"}, "Did you mean 'llama'"),
    "missing": ({"hidden_size": None}, "missing hidden_size"),
    "indivisible": ({"hidden_size": 66}, "not divisible"),
    "heads": ({"num_key_value_heads": 3}, "not a multiple"),
    "type": ({"vocab_size": "many"}, "vocab_size"),
    "zero": ({"num_hidden_layers": 0}, "at least 1"),
    "rope": ({"rope_scaling": {"rope_type": "wobbly", "factor": 2}}, "wobbly"),
    "rope key": ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor"),
    "act": ({"hidden_act": "gelu"}, "gelu"),
}


@pytest.mark.parametrize("changes,words", BAD.values(), ids=BAD)
def test_impossible_configs_are_named(changes, words):
    config = {"model_type": "llama", "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96,
              "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(VicugnaError, match=words):
        models.build({**config, **changes})
