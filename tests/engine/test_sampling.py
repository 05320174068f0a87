"""Sampling against transformers' filters and exact distributions."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vicugna.engine import Sampling, sampling
from vicugna.engine.sampling import Sampler, inverse_cdf, random_stream, truncate
from vicugna.errors import VicugnaError

CPU = torch.device("cpu")
NAN = float("nan")


@pytest.mark.parametrize("wrong", [
    {"temperature": -0.1}, {"temperature": NAN}, {"temperature": float("inf")}, {"top_p": 0.0},
    {"top_p": 1.1}, {"top_p": NAN}, {"min_p": -0.1}, {"min_p": 1.5}, {"min_p": NAN}, {"top_k": -1},
    {"top_k": 1.5}, {"max_new_tokens": 0}, {"max_new_tokens": 2.5}, {"stop": ("a", "")},
    {"stop": (7,)}, {"seed": -1}, {"top_logprobs": -1}], ids=str)
def test_wrong_values_are_named(wrong):
    with pytest.raises(VicugnaError, match=f"sampling: {next(iter(wrong))} is "):
        Sampling(**wrong)


def test_stop_may_be_one_string_or_a_list():
    assert Sampling(stop="ab").stop == ("ab",) and Sampling(stop=["a", "b"]).stop == ("a", "b")


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 4), prefix=st.integers(1, 60),
       k=st.integers(0, 50), p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.03]),
       m=st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]), spread=st.sampled_from([0.01, 1.0, 5.0]))
def test_filters_equal_transformers(seed, rows, prefix, k, p, m, spread):
    logits = spread * torch.randn(rows, 40, generator=torch.Generator().manual_seed(seed))
    expected = logits
    if k:
        expected = TopKLogitsWarper(k)(None, expected)
    if p < 1:
        expected = TopPLogitsWarper(p)(None, expected)
    if m:
        expected = MinPLogitsWarper(m)(None, expected)

    def column(value, dtype=torch.float64):
        return torch.full((rows, 1), value, dtype=dtype)

    with mock.patch.object(sampling, "_PREFIX", prefix):
        kept, order = truncate(logits.softmax(-1), column(k), column(p), column(m))
    found = torch.zeros(rows, 40, dtype=torch.float64).scatter_(1, order, kept)
    found /= found.sum(-1, keepdim=True)
    assert torch.equal(found > 0, expected > float("-inf"))
    assert torch.allclose(found.float(), expected.softmax(-1), atol=1e-6)


def test_inverse_has_exactly_the_given_shares():
    weights = torch.tensor([0.0, 0.1, 0.0, 0.25, 0.65, 0.0]) * 3  # need not be normalised
    grid = (torch.arange(20000, dtype=torch.float64)[:, None] + 0.5) / 20000
    tokens = inverse_cdf(weights.expand(20000, -1), grid)[:, 0]
    shares = torch.bincount(tokens, minlength=6) / 20000
    assert torch.allclose(shares, weights / 3, atol=1e-4)
    edges = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    assert inverse_cdf(weights.expand(2, -1), edges).flatten().tolist() == [1, 4]


MIXED = [Sampling(temperature=1.0, seed=3), Sampling(), Sampling(temperature=0.7, top_k=5, seed=4),
         Sampling(temperature=1.5, top_p=0.8, seed=3, top_logprobs=2),
         Sampling(temperature=1.0, min_p=0.1, seed=9)]


def streams(samplings, copies=None):
    return [random_stream(one.seed, copy) for one, copy in
            zip(samplings, copies or [0] * len(samplings), strict=True)]


def draws(logits, samplings, copies=None):
    """Tokens [row][step] for logits [step, row, V]."""
    sampler, own = Sampler(CPU), streams(samplings, copies)
    return list(zip(*(sampler.choose(step, samplings, own)[0] for step in logits), strict=True))


def test_a_row_does_not_depend_on_its_batch():
    logits = torch.randn(150, len(MIXED), 30)
    together = draws(logits, MIXED)
    for b, own in enumerate(MIXED):
        assert draws(logits[:, b : b + 1], [own])[0] == together[b]
    sampler, own = Sampler(CPU), streams(MIXED)
    for step in logits[:70]:
        sampler.choose(step, MIXED, own)
    rest = [sampler.choose(step[[3, 0]], [MIXED[3], MIXED[0]], [own[3], own[0]])[0]
            for step in logits[70:]]
    assert [tuple(row) for row in zip(*rest, strict=True)] == [together[3][70:], together[0][70:]]


def test_seeds_and_copies_have_streams_of_their_own():
    logits = torch.zeros(40, 4, 1000)
    one, again, copy, other = draws(logits, [*[MIXED[0]] * 3, replace(MIXED[0], seed=8)],
                                    [0, 0, 1, 0])
    assert one == again and len({one, copy, other}) == 3


def test_logprobs_are_of_the_unmodified_distribution():
    logits = 3 * torch.randn(1, 5, 30)
    expected = logits[0].log_softmax(-1)
    tokens, logprobs, tops = Sampler(CPU).choose(logits[0], MIXED, streams(MIXED))
    assert logprobs == pytest.approx(
        expected.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist(), abs=1e-6)
    assert [len(top) for top in tops] == [0, 0, 0, 2, 0]
    values, best = expected[3].topk(2)
    assert [token for token, _ in tops[3]] == best.tolist()
    assert [value for _, value in tops[3]] == pytest.approx(values.tolist(), abs=1e-6)


@pytest.mark.parametrize("temperature", [1e-320, 1e-9, 1e-4])
def test_tiny_temperatures_are_greedy(temperature):
    logits = 1e4 * torch.randn(1, 3, 50)
    samplings = [Sampling(temperature=temperature, top_k=k) for k in (0, 3, 0)]
    assert [row[0] for row in draws(logits, samplings)] == logits[0].argmax(-1).tolist()


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_broken_logits_are_reported(bad):
    logits = torch.zeros(2, 9)
    logits[1, 4] = bad
    for own in (Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.5)):
        with pytest.raises(VicugnaError, match="NaN or infinite"):
            Sampler(CPU).choose(logits, [own] * 2, streams([own] * 2))
