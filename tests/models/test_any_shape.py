"""Random shapes of the architectures that share Llama's attention: what holds for all of them."""

from pathlib import Path
from tempfile import TemporaryDirectory

import parity
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vicugna
from vicugna import models


def parameters(c) -> int:
    """How many there are, by formula."""
    D, F, kind = c.hidden_size, c.intermediate_size, c.to_dict()["model_type"]
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = 2 * D * (queries + keys) + 3 * D * F + 2 * D
    if kind == "qwen2":
        layer += queries + 2 * keys
    if kind == "llama":
        layer += c.attention_bias * (queries + 2 * keys + D) + c.mlp_bias * (2 * F + D)
    if kind == "mixtral":
        layer += (c.num_local_experts - 1) * 3 * D * F + c.num_local_experts * D
    return c.num_hidden_layers * layer + D + c.vocab_size * D * (2 - c.tie_word_embeddings)


SIZES = {
    "mixtral 8x7B": (46_702_792_704, {"model_type": "mixtral", "vocab_size": 32000,
                                      "intermediate_size": 14336, "num_hidden_layers": 32}),
    "mistral 7B": (7_241_732_096, {"model_type": "mistral", "vocab_size": 32000,
                                   "intermediate_size": 14336, "num_hidden_layers": 32}),
    "mistral nemo": (12_247_782_400, {
        "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "head_dim": 128,
        "intermediate_size": 14336, "num_hidden_layers": 40}),
    "qwen2.5 7B": (7_615_616_512, {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584,
        "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
        "num_hidden_layers": 28}),
}


@pytest.mark.parametrize(("size", "changes"), SIZES.values(), ids=SIZES)
def test_published_sizes(size, changes):
    with torch.device("meta"):
        network = models.build({"hidden_size": 4096, "num_attention_heads": 32,
                                "num_key_value_heads": 8, **changes})
    made = sum(p.numel() for p in network.parameters())
    assert made == parameters(network.config) == size


@st.composite
def shapes(draw):
    """A config.json of any of them; keys of the others are ignored."""
    groups, experts = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    return {"model_type": draw(st.sampled_from(["llama", "mistral", "ministral", "ministral3",
                                                "qwen2", "mixtral"])),
            "vocab_size": 97, "hidden_size": draw(st.integers(2, 20)),
            "intermediate_size": draw(st.integers(1, 20)),
            "num_hidden_layers": draw(st.integers(1, 3)), "num_key_value_heads": groups,
            "num_attention_heads": groups * draw(st.integers(1, 3)),
            "head_dim": 2 * draw(st.integers(1, 5)), "num_local_experts": experts,
            "num_experts_per_tok": draw(st.integers(1, experts)), "initializer_range": 0.3,
            "sliding_window": draw(st.none() | st.integers(1, 9)),
            "use_sliding_window": draw(st.booleans()), "max_window_layers": draw(st.integers(0, 3)),
            "attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans()),
            "tie_word_embeddings": draw(st.booleans())}


@settings(max_examples=40, deadline=None)
@given(shape=shapes(), parts=st.sampled_from([[12], [1] * 12, [5, 1, 6], [3, 9]]),
       pads=st.tuples(st.integers(0, 11), st.integers(0, 11)), seed=st.integers(0, 99))
def test_any_shape(shape, parts, pads, seed):
    """By formula as by construction; filled by its seed; cached and padded as whole; round trip."""
    network = models.build(shape)
    models.initialise(network, seed)
    assert all(p.isfinite().all() for p in network.parameters())
    assert sum(p.numel() for p in network.parameters()) == parameters(network.config)

    tokens = parity.random_tokens(2, 12)
    positions = (torch.arange(12) - torch.tensor(pads)[:, None]).clamp(min=0)
    got = parity.in_parts(network, tokens, positions, parts, list(pads))
    for row, n in enumerate(pads):
        due = parity.logits_of(network, tokens[row : row + 1, n:])
        torch.testing.assert_close(got[row : row + 1, n:], due, atol=2e-5, rtol=1e-4)

    with TemporaryDirectory() as folder:
        vicugna.Model(network).save(Path(folder) / "saved")
        again = vicugna.load(Path(folder) / "saved")
        assert again.config == network.config
        assert again.digest == vicugna.Model(network).digest
