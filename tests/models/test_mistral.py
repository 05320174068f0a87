"""Mistral against transformers' MistralForCausalLM (and MinistralForCausalLM) on random weights."""

import parity
import pytest
import torch
from transformers import MinistralConfig, MistralConfig

from vicugna import models
from vicugna.errors import VicugnaError
from vicugna.models.layers.mask import Span

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def config(**changes):
    return MistralConfig(**{**parity.TINY, "sliding_window": 7, **changes})


CASES = {
    "window": {},
    "a window of one": {"sliding_window": 1},
    "a window longer than the row": {"sliding_window": 64},
    "no window": {"sliding_window": None},
    "heads unlike the width": {"head_dim": 24},  # Nemo
    "one key head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "large theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e8}},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}},
    "yarn": parity.YARN,
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_logits_equal_transformers(changes):
    theirs, ours = parity.pair(config(**changes))
    parity.agree(theirs, ours, parity.random_tokens(3, 40))


@pytest.mark.parametrize("first", [8190, 32760, 131000])
def test_far_positions_equal_transformers(first):
    theirs, ours = parity.pair(config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    parity.agree_uncached(theirs, ours, parity.random_tokens(1, 30), first)
    parity.agree_cached(theirs, ours, parity.random_tokens(1, 30), [13, 1, 16], first)


def test_a_long_row_equals_transformers():
    """Longer than the engine's blocks, with a window that its buffers outgrow."""
    theirs, ours = parity.pair(config(num_hidden_layers=2, sliding_window=100))
    tokens = parity.random_tokens(1, 700)
    parity.agree_uncached(theirs, ours, tokens)
    parity.agree_cached(theirs, ours, tokens, [300, 1, 1, 398])


def test_layers_of_two_kinds_equal_transformers(tmp_path):
    """transformers takes a mistral whose config names layer_types for a ministral."""
    theirs = parity.reference(MinistralConfig(**parity.TINY, head_dim=16, sliding_window=7,
                                       layer_types=MIXED))
    ours = models.build({**theirs.config.to_dict(), "model_type": "mistral"})
    ours.load_state_dict(theirs.state_dict())
    assert [span.window for span in ours.config.spans()] == [7, None, 7]
    tokens = parity.random_tokens(2, 40)
    parity.agree_uncached(theirs, ours, tokens)
    parity.agree_cached(theirs, ours, tokens, [20, 1, 19])
    parity.agree_padded(theirs, ours, tokens, [0, 12])


@pytest.mark.parametrize("window", [7, None])
def test_gradients_equal_transformers(window):
    theirs, ours = parity.pair(config(sliding_window=window))
    parity.agree_gradients(theirs, ours, parity.random_tokens(2, 40))


@pytest.mark.parametrize("changes", [{}, {"sliding_window": None, "tie_word_embeddings": True,
                                          "head_dim": 24}, CASES["yarn"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(changes, dtype, tmp_path):
    parity.agree_round_trip(parity.reference(config(**changes)).to(dtype), tmp_path)


def test_the_window_of_old_and_new_files():
    """Absent means 4096 and null means none, as transformers reads them."""
    shape = {key: parity.TINY[key] for key in ("vocab_size", "hidden_size", "intermediate_size",
                                        "num_hidden_layers", "num_attention_heads")}
    shape["model_type"] = "mistral"
    assert models.build(shape).config.spans() == [Span(4096)] * 3
    assert models.build({**shape, "sliding_window": None}).config.spans() == [Span()] * 3
    kept = models.build({**shape, "sliding_window": None}).config
    assert models.build(kept.to_dict()).config == kept
    assert "layer_types" not in kept.to_dict()  # which would make it another architecture


BAD = {
    "window": ({"sliding_window": 0}, "sliding_window is 0"),
    "window type": ({"sliding_window": "wide"}, "not of type int or null"),
    "kinds": ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
              "layer_types"),
    "too few kinds": ({"layer_types": ["full_attention"]}, "layer_types"),
    "kind without window": ({"layer_types": MIXED, "sliding_window": None}, "sliding_window"),
    "rope": ({"rope_scaling": {"rope_type": "wobbly", "factor": 2}}, "wobbly"),
}


@pytest.mark.parametrize("changes,words", BAD.values(), ids=BAD)
def test_impossible_configs_are_named(changes, words):
    with pytest.raises(VicugnaError, match=words):
        models.build({"model_type": "mistral", **parity.TINY, **changes})
