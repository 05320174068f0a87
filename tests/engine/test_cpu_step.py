"""The fused step against the same network module by module."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_networks import finish, pack_network, random_network, random_prompts

pytest.importorskip("numba")

from vicugna.engine import Engine, Request, Sampling
from vicugna.engine.cpu import step
from vicugna.engine.pages import LayerShape

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
NETWORKS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1, "attention_bias": True},
    "mistral": {"sliding_window": 20},
    "qwen2": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                               "original_max_position_embeddings": 512}},
    "vicugna": {}}


def packed(kind: str, form: str) -> Any:
    return pack_network(random_network.__wrapped__(kind, **WIDE, **NETWORKS[kind]), form)


def answers(network: Any, prompts: list[list[int]], **options: Any) -> list[Any]:
    """Tokens and log-probabilities of each prompt."""
    engine = Engine(network, tokens=500, slots=4, **options)
    ids = [engine.add(Request(tuple(prompt), Sampling(8))) for prompt in prompts]
    done = finish(engine)
    return [done[id][:2] for id in ids]


@pytest.mark.parametrize("form", ["f32", "bf16", "q8_0"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_the_same_as_module_by_module(
        kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, prompts = packed(kind, form), random_prompts([1, 37, 70])
    fused = answers(network, prompts)
    with monkeypatch.context() as patch:
        patch.setattr(step, "lower", lambda network, pages: None)
        plain = answers(network, prompts)
    for (tokens, logprobs), (others, wanted) in zip(fused, plain, strict=True):
        assert tokens == others
        # Keys are float16, and activations int8 beside q8_0: a last bit can become a step.
        assert logprobs == pytest.approx(wanted, abs={"f32": 1e-4, "bf16": 1e-3}.get(form, 0.1))


NETWORK = packed("mistral", "q4_0")


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5), budget=st.integers(16, 80))
def test_a_sequence_has_the_same_bits_in_any_batch(lengths: list[int], budget: int) -> None:
    """However its prompt is split, whatever is computed beside it."""
    prompts = random_prompts(lengths, seed=sum(lengths))
    together = answers(NETWORK, prompts, token_budget=budget)
    for prompt, found in zip(prompts, together, strict=True):
        assert answers(NETWORK, [prompt], prefix_cache=False)[0] == found


def test_on_any_number_of_threads() -> None:
    prompts, threads, found = random_prompts([1, 30]), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(answers(NETWORK, prompts))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_networks_with_other_parts_have_none() -> None:
    pages = LayerShape()
    assert step.lower(random_network("llama"), pages) is None  # its weights are not packed
    assert step.lower(packed("vicugna", "f32"), pages) is None
