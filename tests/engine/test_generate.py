"""Generation: the same tokens as without a cache, where it stops, and what it says."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_networks import (
    VOCABULARY,
    Scripted,
    finish,
    plain_logits,
    random_network,
    random_prompts,
    small_tokenizer,
)

from vicugna import engine
from vicugna.engine import Engine, Request, Sampling
from vicugna.errors import VicugnaError
from vicugna.models.layers.attention import Dense

KINDS = ("llama", "vicugna")


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(KINDS), lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
       budget=st.sampled_from([16, 17, 2048]))
def test_greedy_equals_a_pass_without_cache(kind, lengths, budget):
    network, prompts = random_network(kind), random_prompts(lengths)
    made = Engine(network, tokens=500, slots=3, token_budget=budget)
    ids = [made.add(Request(tuple(prompt), Sampling(max_new_tokens=12))) for prompt in prompts]
    done = finish(made)
    for prompt, id in zip(prompts, ids, strict=True):
        tokens, logprobs, reason = done[id]
        expected = plain_logits(network, prompt + tokens)[len(prompt) - 1 : -1]
        assert tokens == expected.argmax(-1).tolist()
        best = expected.log_softmax(-1).max(-1).values
        assert (best - torch.tensor(logprobs)).abs().max() < 1e-4
        assert reason == "length"
    assert made.blocks.used == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_ragged_batch_equals_single_rows(kind):
    network, prompts = random_network(kind), random_prompts([1, 30, 7, 7, 19])
    samplings = [Sampling(max_new_tokens=5 + 4 * n, temperature=0.5 * n, seed=n, top_logprobs=n)
                 for n in range(5)]
    together = engine.generate(network, None, prompts, samplings)
    for prompt, sampling, completion in zip(prompts, samplings, together, strict=True):
        alone = engine.generate(network, None, [prompt], sampling)[0]
        assert alone.tokens == completion.tokens and len(alone.tokens) == sampling.max_new_tokens
        assert alone.logprobs == pytest.approx(completion.logprobs, abs=1e-4)
        deltas = list(engine.stream(network, None, prompt, sampling))
        assert [token for delta in deltas for token in delta.tokens] == alone.tokens
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert [top for delta in deltas for top in delta.top_logprobs] == alone.top_logprobs


def test_equal_prompts_are_read_once_and_sampled_apart():
    prompts = [[1, 2, 3]] * 4 + [[4, 5, 6]]
    scripted = Scripted([7, 8, 9], 3, VOCABULARY)
    engine.generate(scripted, None, prompts, Sampling(max_new_tokens=2))
    assert scripted.batches[1:] == [6, 5]  # after the one token that tells what to keep
    network, sampling = random_network(), Sampling(temperature=3.0, seed=5, max_new_tokens=20)
    copies = engine.generate(network, None, prompts, sampling)
    assert len({tuple(completion.tokens) for completion in copies}) == 5
    again = engine.generate(network, None, prompts, sampling)
    assert [c.tokens for c in again] == [c.tokens for c in copies]
    same = engine.generate(network, None, prompts[:2], [sampling] * 2)
    assert same[0].tokens == same[1].tokens == copies[0].tokens


def test_finished_rows_leave_the_batch():
    scripted = Scripted([7], 3, VOCABULARY)
    samplings = [Sampling(max_new_tokens=n) for n in (1, 5, 2, 2)]
    done = engine.generate(scripted, None, [[n, 2, 3] for n in range(4)], samplings)
    assert [len(completion.tokens) for completion in done] == [1, 5, 2, 2]
    assert scripted.batches[1:] == [12, 3, 1, 1, 1]


def expected_text(text, stops):
    """What is left of `text` when characters come one by one until a stop string is complete."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@settings(max_examples=150, deadline=None)
@given(text=st.text("abc é🙂", min_size=1, max_size=30),
       stops=st.lists(st.text("abc é🙂", min_size=1, max_size=5), max_size=3))
def test_stop_strings_end_the_text_wherever_tokens_end(text, stops):
    tokenizer = small_tokenizer()
    script = [*tokenizer.encode(text), tokenizer.eos_ids[0]]
    scripted, sampling = Scripted(script, 1, tokenizer.vocab_size), Sampling(99, stop=tuple(stops))
    done = engine.generate(scripted, tokenizer, [[0]], sampling)[0]
    deltas = list(engine.stream(scripted, tokenizer, [0], sampling))
    assert done.text == "".join(delta.text for delta in deltas) == expected_text(text, stops)
    assert done.finish_reason == deltas[-1].finish_reason == "stop"
    assert done.tokens == script[: len(done.tokens)]  # and not one more than needed:
    assert not any(stop in tokenizer.decode(done.tokens[:-1]) for stop in stops)


def test_end_of_turn_is_a_token_but_not_text():
    tokenizer = small_tokenizer()
    for end in tokenizer.eos_ids:
        scripted = Scripted([*tokenizer.encode("abc"), end], 1, tokenizer.vocab_size)
        done = engine.generate(scripted, tokenizer, [[0]], Sampling())[0]
        assert (done.text, done.tokens[-1], done.finish_reason) == ("abc", end, "stop")


def test_half_a_character_is_held_back():
    tokenizer = small_tokenizer()
    script = [id for byte in "🦙".encode() for id in range(tokenizer.vocab_size)
              if tokenizer.token_bytes(id) == bytes([byte])]
    scripted = Scripted(script, 1, tokenizer.vocab_size)
    texts = [delta.text for delta in engine.stream(scripted, tokenizer, [0], Sampling(4))]
    assert texts == ["", "", "", "🦙"]
    assert engine.generate(scripted, tokenizer, [[0]], Sampling(3))[0].text == "\ufffd"


@pytest.mark.parametrize(("piece", "stops", "text"), [
    (b"xabc", ("abc", "b"), "xa"), (b"xabc", ("b", "ab"), "x"), (b"x|\xf0", ("|",), "x")])
def test_one_token_may_hold_several_ends(piece, stops, text):
    tokenizer = small_tokenizer()
    scripted = Scripted([5], 1, tokenizer.vocab_size)
    with mock.patch.object(tokenizer, "token_bytes", lambda id: piece):
        done = engine.generate(scripted, tokenizer, [[0]], Sampling(stop=stops))[0]
    assert (done.text, len(done.tokens), done.finish_reason) == (text, 1, "stop")


def test_the_context_is_the_end():
    scripted = Scripted([7], 5, VOCABULARY, context=8)
    done = engine.generate(scripted, None, [[1] * 5, [1] * 8], Sampling(max_new_tokens=100))
    assert [len(c.tokens) for c in done] == [3, 0]
    assert {c.finish_reason for c in done} == {"length"}
    with pytest.raises(VicugnaError, match="9 tokens, but the context holds 8"):
        engine.generate(scripted, None, [[1] * 9], Sampling())


@pytest.mark.parametrize("polls", [0, 1, 4])
def test_cancelling_stops(polls):
    left = [polls]

    def cancelled():
        left[0] -= 1
        return left[0] == -1  # once only: the engine must not ask again

    scripted = Scripted([7], 1, VOCABULARY)
    done = engine.generate(scripted, None, [[1], [2]], Sampling(max_new_tokens=50), cancelled)
    assert [len(c.tokens) for c in done] == [polls] * 2
    assert {c.finish_reason for c in done} == {"cancelled"}
    left[0] = polls
    deltas = list(engine.stream(scripted, None, [1], Sampling(max_new_tokens=50), cancelled))
    assert len(deltas) == polls + 1 and deltas[-1].finish_reason == "cancelled"


@pytest.mark.parametrize(("prompts", "sampling", "message"), [
    ([[1], []], Sampling(), "prompt 2: the prompt is empty"),
    ([[1, 61]], Sampling(), "token ids from 1 to 61, but the vocabulary has 61"),
    ([[-1]], Sampling(), "ids from -1 to -1"),
    ([[1]], Sampling(stop=("a",)), "stop strings need a tokenizer"),
    ([[1]], [Sampling()] * 2, "1 prompts but 2 samplings")])
def test_wrong_input_is_named(prompts, sampling, message):
    with pytest.raises(VicugnaError, match=message):
        engine.generate(random_network(), None, prompts, sampling)
    if len(prompts) == 1 and isinstance(sampling, Sampling):
        with pytest.raises(VicugnaError, match=message):  # at the call, before the first delta
            engine.stream(random_network(), None, prompts[0], sampling)


def test_no_prompts_no_completions():
    assert engine.generate(random_network(), None, [], Sampling()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_generation_leaves_the_network_trainable(kind):
    network = random_network(kind)
    steps = engine.stream(network, None, [1, 2, 3], Sampling(max_new_tokens=3))
    next(steps)
    assert not torch.is_inference_mode_enabled()
    tokens, positions = torch.tensor([[1, 2, 3]]), torch.arange(3)[None]
    network.lm_head(network(tokens, positions, Dense())).sum().backward()
    assert len(list(steps)) == 2
    network.zero_grad()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    network = random_network(head_dim=16).to(dtype)
    done = engine.generate(network, None, random_prompts([9, 40]), Sampling(max_new_tokens=8))
    assert [len(completion.tokens) for completion in done] == [8, 8]
    network.float()


def test_mixture_of_experts():
    network, prompts = random_network(num_experts=4), random_prompts([5, 12])
    done = engine.generate(network, None, prompts, replace(Sampling(), max_new_tokens=6))
    for prompt, completion in zip(prompts, done, strict=True):
        expected = plain_logits(network, prompt + completion.tokens)[len(prompt) - 1 : -1]
        assert completion.tokens == expected.argmax(-1).tolist()
