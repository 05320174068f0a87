"""YaRN against transformers': the frequencies to the last bit, and through Llama."""

import parity
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vicugna.errors import VicugnaError
from vicugna.models import llama
from vicugna.models.layers import rope

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
        "rope_theta": 10000.0}


@settings(max_examples=60, deadline=None)
@given(scaling=st.fixed_dictionaries(
    {"factor": st.one_of(st.none(), st.integers(1, 64), st.floats(1, 64)),
     "rope_theta": st.sampled_from([100.0, 10000.0, 1e6])},
    optional={"original_max_position_embeddings": st.sampled_from([6, 64, 4096, 32768]),
              "beta_fast": st.integers(2, 64), "beta_slow": st.sampled_from([None, 0.5, 1]),
              "truncate": st.booleans(), "attention_factor": st.one_of(st.none(), st.just(1.4)),
              "mscale": st.sampled_from([0, 0.7, 1.0]),
              "mscale_all_dim": st.sampled_from([None, 0, 0.5, 1.0])}),
    head_dim=st.sampled_from([2, 8, 64, 128]), key=st.sampled_from(["type", "rope_type"]))
@example(scaling={"factor": 4, "original_max_position_embeddings": 6}, head_dim=8, key="type")
def test_frequencies_and_factor_equal_transformers(scaling, head_dim, key):
    """Also of the keys that a config.json may lack or leave null."""
    written = {"vocab_size": 8, "hidden_size": 4 * head_dim, "intermediate_size": 8,
               "num_hidden_layers": 1, "num_attention_heads": 4,
               "max_position_embeddings": 131072, "rope_scaling": {key: "yarn", **scaling}}
    c = llama.Config.from_dict(written)  # first: transformers adds keys to what it is given
    inverse, factor = ROPE_INIT_FUNCTIONS["yarn"](LlamaConfig(**written))
    assert torch.equal(rope.inverse_frequencies(c.head_dim, c.rope_theta, c.rope_scaling), inverse)
    assert rope.attention_factor(c.rope_scaling) == factor


@pytest.mark.parametrize("changes", [{}, {"attention_factor": 0.8}, {"truncate": False},
                                     {"mscale": 0.7, "mscale_all_dim": 1.0}], ids=str)
def test_llama_with_yarn_equals_transformers(changes):
    theirs, ours = parity.pair(LlamaConfig(**parity.TINY, rope_parameters={**YARN, **changes}))
    for first in (0, 40000):
        parity.agree_uncached(theirs, ours, parity.random_tokens(2, 90), first)
        parity.agree_cached(theirs, ours, parity.random_tokens(2, 20), [15, 1, 4], first)


SHAPE = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1,
         "num_attention_heads": 4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("scaling", [YARN, LLAMA3], ids=["yarn", "llama3"])
def test_the_original_context_beside_the_scaling_comes_first(scaling, inside):
    """As files of Phi have it, and transformers reads it for every architecture."""
    kept = {key: x for key, x in scaling.items() if inside or not key.startswith("original")}
    written = {**SHAPE, "max_position_embeddings": 256, "original_max_position_embeddings": 32,
               "rope_scaling": kept}
    c = llama.Config.from_dict(written)
    inverse, _ = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](LlamaConfig(**written))
    other = rope.inverse_frequencies(c.head_dim, c.rope_theta, scaling)
    mine = rope.inverse_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
    assert torch.equal(mine, inverse) and not torch.allclose(mine, other, rtol=1e-3)


def test_scaling_outside_yarn_leaves_cosines_alone():
    for scaling in (None, {"rope_type": "linear", "factor": 4.0, "attention_factor": 2.0}):
        assert rope.attention_factor(scaling) == 1.0


BAD = {
    "kind": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "unknown .* 'dynamic'"),
    "kind without a factor": ({"rope_scaling": {"type": "longrope"}}, "unknown .* 'longrope'"),
    "missing": ({"rope_scaling": {"type": "yarn"}}, "lacks 'factor'"),
    "value": ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "impossible"),
    "part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "by layer": ({"rope_parameters": {"full_attention": YARN}}, "all layers"),
    "no mapping": ({"rope_scaling": "yarn"}, "all layers"),
}


@pytest.mark.parametrize("changes,words", BAD.values(), ids=BAD)
def test_impossible_scalings_are_named(changes, words):
    llama.Config.from_dict(SHAPE)
    with pytest.raises(VicugnaError, match=words):
        llama.Config.from_dict({**SHAPE, **changes})
