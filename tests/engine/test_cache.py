"""The cache against attention over the whole sequence."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_networks import plain_logits, random_network, random_prompts

from vicugna.engine import Cache, cache
from vicugna.models.layers import attention
from vicugna.models.layers.attention import Dense
from vicugna.models.layers.mask import Span

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
def test_select_continues_with_the_chosen_rows(kind, rows):
    network, prompts = random_network(kind), random_prompts([3, 11, 7])
    more = random_prompts([9] * len(rows), seed=1)
    pads = [11 - len(prompt) for prompt in prompts]
    tokens = torch.tensor([[0] * pad + p for pad, p in zip(pads, prompts, strict=True)])
    positions = (torch.arange(11) - torch.tensor(pads)[:, None]).clamp(min=0)
    attend = Cache(pads)
    with torch.no_grad():
        network(tokens, positions, attend)
        attend.select(rows)
        for step in range(9):
            now = torch.tensor([[row[step]] for row in more])
            where = torch.tensor([[len(prompts[row]) + step] for row in rows])
            logits = network.lm_head(network(now, where, attend))[:, 0]
    for b, row in enumerate(rows):
        expected = plain_logits(network, prompts[row] + more[b])[-1]
        assert (logits[b] - expected).abs().max() < 1e-4


def test_window_layers_drop_columns_and_global_ones_do_not():
    attend = Cache([0])
    for T in [700, *[1] * 700]:
        x = torch.randn(1, T, 2, 4)
        attend(0, x, x, x, Span(8))
        attend(1, x, x, x, Span())
        rows = torch.randn(1, T, 6)
        assert attend.conv_state(0, rows, 3).shape == (1, 3, 6)
    windowed, whole = attend._layers[0].buffers[0], attend._layers[1].buffers[0]
    assert windowed.shape[2] <= 8 + 1 + cache._SPARE
    assert 1400 <= whole.shape[2] <= 1400 + cache._SPARE
    assert attend._conv_states[0].untyped_storage().nbytes() == 3 * 6 * 4


def test_conv_state_is_the_preceding_rows():
    attend, x = Cache([0, 0]), torch.randn(2, 10, 3)
    assert not attend.conv_state(0, x[:, :1], 2).any()
    assert torch.equal(attend.conv_state(0, x[:, 1:2], 2)[:, 1], x[:, 0])
    assert torch.equal(attend.conv_state(0, x[:, 2:9], 2), x[:, :2])
    assert torch.equal(attend.conv_state(0, x[:, 9:], 2), x[:, 7:9])


def test_no_query_is_masked_from_every_key():
    attend = Cache([3, 0, 5])
    like = torch.zeros(1)
    masks = [attend._row_masks(1, range(end), Span(), like) for end in (1, 4, 9)]
    for span in (Span(), Span(window=1), Span(window=3), Span(chunk=1), Span(chunk=3)):
        masks.append(attend._row_masks(6, range(6), span, like))
        masks.append(attend._row_masks(4, range(1, 6), span, like))
    for mask in masks:
        assert bool((mask == 0).any(-1).all())


def defined(q_THK, k_TGK, v_TGK, span):
    """Attention of one document, a query at a time, as `Span` says it."""
    out = []
    for t in range(len(q_THK)):
        first = 0
        if span.window is not None:
            first = max(0, t - span.window + 1)
        if span.chunk is not None:
            first = t // span.chunk * span.chunk
        share = q_THK.shape[1] // k_TGK.shape[1]
        keys, values = (x[first:t + 1].repeat_interleave(share, dim=1) for x in (k_TGK, v_TGK))
        scores = torch.einsum("hk,shk->hs", q_THK[t], keys) / q_THK.shape[2] ** 0.5
        out.append(torch.einsum("hs,shk->hk", scores.softmax(-1), values))
    return torch.stack(out)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
       calls=st.lists(st.integers(1, 25), min_size=1, max_size=3),
       span=st.sampled_from([Span(), Span(window=1), Span(window=6), Span(window=50),
                             Span(chunk=1), Span(chunk=4), Span(chunk=9), Span(chunk=50)]),
       values=st.sampled_from(["own", "narrow", "keys"]), groups=st.sampled_from([1, 2, 4]),
       block=st.integers(1, 9))
def test_every_span_is_what_it_says(lengths, calls, span, values, groups, block):
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = (4, 6), (groups, 6), (groups, 3 if values == "narrow" else 6)
    documents = [[torch.randn(n, *shape, generator=generator) for shape in shapes]
                 for n in lengths]
    if values == "keys":
        documents = [[q, k, k] for q, k, _ in documents]
    wanted = [defined(*document, span) for document in documents]

    row = [torch.cat(parts)[None] for parts in zip(*documents, strict=True)]
    packed = Dense(torch.cat([torch.arange(n) for n in lengths])[None])
    got = packed(0, row[0], row[1], None if values == "keys" else row[2], span)[0]
    assert (got - torch.cat(wanted)).abs().max() < 1e-5
    if span == Span():  # the form that training in bfloat16 takes
        with mock.patch.object(attention, "BLOCK", block):
            got = packed._blocked(*(x.transpose(1, 2) for x in row)).transpose(1, 2)[0]
        assert (got - torch.cat(wanted)).abs().max() < 1e-5

    longest, start = max(lengths), 0
    padded = [torch.stack([torch.cat([x.new_full((longest - len(x), *x.shape[1:]), 7.0), x])
                           for x in parts]) for parts in zip(*documents, strict=True)]
    attend, outs = Cache([longest - n for n in lengths]), []
    with mock.patch.multiple(cache, _BLOCK=block, _WINDOW_BLOCK=block):
        while start < longest:
            q, k, v = (x[:, start:start + calls[len(outs) % len(calls)]] for x in padded)
            outs.append(attend(0, q, k, None if values == "keys" else v, span))
            start += q.shape[1]
    for out, want in zip(torch.cat(outs, dim=1), wanted, strict=True):
        assert (out[longest - len(want):] - want).abs().max() < 1e-5
