"""The cache against attention over the whole sequence."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_networks import plain_logits, random_network, random_prompts

from vicugna.engine import Cache, cache
from vicugna.models.layers.attention import Span

KINDS = ("llama", "vicugna")


@torch.no_grad()
def cached_logits(network, prompts, chunks):
    """Logits [T, V] of each prompt, read left-padded in calls of `chunks` columns."""
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    tokens = torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)])
    positions = (torch.arange(longest) - torch.tensor(pads)[:, None]).clamp(min=0)
    attend, parts, start = Cache(pads), [], 0
    while start < longest:
        here = slice(start, start + chunks[len(parts) % len(chunks)])
        parts.append(network.lm_head(network(tokens[:, here], positions[:, here], attend)))
        start = here.stop
    whole = torch.cat(parts, dim=1)
    return [row[pad:] for pad, row in zip(pads, whole, strict=True)]


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(KINDS), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
       chunks=st.lists(st.integers(1, 25), min_size=1, max_size=3),
       window=st.sampled_from([1, 2, 5, 13, 64]), key_heads=st.sampled_from([1, 2, 4]),
       conv=st.sampled_from([1, 4]), blocks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
       spare=st.integers(0, 9))
def test_any_split_and_padding_equals_whole(kind, lengths, chunks, window, key_heads, conv, blocks,
                                            spare):
    changes = {"num_key_value_heads": key_heads}
    if kind == "vicugna":
        changes |= {"sliding_window": window, "conv_width": conv}
    network, prompts = random_network(kind, **changes), random_prompts(lengths)
    with (mock.patch.object(cache, "_BLOCK", blocks[0]), mock.patch.object(cache, "_SPARE", spare),
          mock.patch.object(cache, "_WINDOW_BLOCK", blocks[1])):
        read = cached_logits(network, prompts, chunks)
    for prompt, logits in zip(prompts, read, strict=True):
        assert (logits - plain_logits(network, prompt)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_long_prompt_in_real_blocks(kind):
    network, prompts = random_network(kind), random_prompts([900, 411])
    for prompt, logits in zip(prompts, cached_logits(network, prompts, [600]), strict=True):
        assert (logits - plain_logits(network, prompt)).abs().max() < 1e-4


@settings(max_examples=20, deadline=None)
@given(kind=st.sampled_from(KINDS), rows=st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_keep_goes_on_with_the_chosen_rows(kind, rows):
    network, prompts = random_network(kind), random_prompts([3, 11, 7])
    more = random_prompts([9] * len(rows), seed=1)
    pads = [11 - len(prompt) for prompt in prompts]
    tokens = torch.tensor([[0] * pad + p for pad, p in zip(pads, prompts, strict=True)])
    positions = (torch.arange(11) - torch.tensor(pads)[:, None]).clamp(min=0)
    attend = Cache(pads)
    with torch.no_grad():
        network(tokens, positions, attend)
        attend.keep(rows)
        for step in range(9):
            now = torch.tensor([[row[step]] for row in more])
            where = torch.tensor([[len(prompts[row]) + step] for row in rows])
            logits = network.lm_head(network(now, where, attend))[:, 0]
    for b, row in enumerate(rows):
        expected = plain_logits(network, prompts[row] + more[b])[-1]
        assert (logits[b] - expected).abs().max() < 1e-4


def test_window_layers_forget_and_global_ones_do_not():
    attend = Cache([0])
    for T in [700, *[1] * 700]:
        x = torch.randn(1, T, 2, 4)
        attend(0, x, x, x, Span(8))
        attend(1, x, x, x, Span())
        rows = torch.randn(1, T, 6)
        assert attend.before(0, rows, 3).shape == (1, 3, 6)
    windowed, whole = attend._stores[0].kept, attend._stores[1].kept
    assert windowed.shape[3] <= 8 + 1 + cache._SPARE
    assert 1400 <= whole.shape[3] <= 1400 + cache._SPARE
    assert attend._rows[0].untyped_storage().nbytes() == 3 * 6 * 4


def test_before_gives_the_rows_just_before():
    attend, x = Cache([0, 0]), torch.randn(2, 10, 3)
    assert not attend.before(0, x[:, :1], 2).any()
    assert torch.equal(attend.before(0, x[:, 1:2], 2)[:, 1], x[:, 0])
    assert torch.equal(attend.before(0, x[:, 2:9], 2), x[:, :2])
    assert torch.equal(attend.before(0, x[:, 9:], 2), x[:, 7:9])


def test_no_query_sees_nothing():
    attend = Cache([3, 0, 5])
    masks = [attend._padding(0, end, torch.zeros(1)) for end in (1, 4, 9)]
    masks.append(attend._without_pads(attend._corner(None, 6, 6, masks[0]), 0))
    masks.append(attend._without_pads(attend._corner(2, 4, 5, masks[0]), 1))
    for mask in masks:
        assert bool((mask == 0).any(-1).all())
