"""Attention over pages against attention over the whole sequence."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import CPU, PagedRows
from tiny_networks import plain_logits, random_network, random_prompts

from vicugna.engine import cpu, paged_attention
from vicugna.engine.blocks import BLOCK
from vicugna.engine.paged_attention import Places
from vicugna.models.layers import attention
from vicugna.models.layers.attention import Dense
from vicugna.models.layers.mask import Span

KINDS = ("llama", "vicugna")


def read_in_parts(network, prompts, chunks):
    """Logits [T, V] of each prompt; all are read in calls of `chunks` tokens each."""
    rows, parts, start = PagedRows(network, len(prompts)), [], 0
    while start < max(map(len, prompts)):
        stop = start + chunks[len(parts) % len(chunks)]
        parts.append(rows.logits([torch.tensor(prompt[start:stop], dtype=torch.long)
                                  for prompt in prompts]))
        start = stop
    return [torch.cat(row) for row in zip(*parts, strict=True)]


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(KINDS), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
       chunks=st.lists(st.integers(1, 25), min_size=1, max_size=3),
       window=st.sampled_from([1, 2, 5, 13, 64]), key_heads=st.sampled_from([1, 2, 4]),
       conv=st.sampled_from([1, 4]), queries=st.integers(1, 9))
def test_any_split_and_batch_equals_whole(kind, lengths, chunks, window, key_heads, conv, queries):
    changes = {"num_key_value_heads": key_heads}
    if kind == "vicugna":
        changes |= {"sliding_window": window, "conv_width": conv}
    network, prompts = random_network(kind, **changes), random_prompts(lengths)
    with mock.patch.multiple(paged_attention, QUERIES=queries, WINDOW_QUERIES=queries):
        read = read_in_parts(network, prompts, chunks)
    for prompt, logits in zip(prompts, read, strict=True):
        assert (logits - plain_logits(network, prompt)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_long_prompts_in_real_blocks(kind):
    network, prompts = random_network(kind), random_prompts([900, 411])
    for prompt, logits in zip(prompts, read_in_parts(network, prompts, [600]), strict=True):
        assert (logits - plain_logits(network, prompt)).abs().max() < 1e-4


@pytest.mark.skipif(not cpu.available(), reason="no compiled kernels here")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_attention_equals_whole(kind):
    """Heads of 16 features and more go through it."""
    network, prompts = random_network(kind, head_dim=16), random_prompts([90, 1, 41])
    for prompt, logits in zip(prompts, read_in_parts(network, prompts, [50, 1, 7]), strict=True):
        assert (logits - plain_logits(network, prompt)).abs().max() < 1e-4


def test_windows_and_chunks_give_blocks_back():
    network = random_network("vicugna")
    rows, tokens = PagedRows(network, 1), torch.tensor(random_prompts([700])[0])
    held = []
    for part in tokens.split([300, *[1] * 400]):
        rows.logits([part])
        held.append([len(pool.references) for pool in rows.blocks.pools])
    windowed, whole = sorted(held[-1])
    assert rows.pages.conv_span == Span(5)  # the window of 5 is long enough for 3 rows more
    assert windowed <= 2 and whole == -(-700 // BLOCK)


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


class FakePages:
    """The pages of one layer, in which each sequence has its blocks in an order of their own."""

    def __init__(self, span, k_TGK, v_TGU, blocks, slots):
        self.span, G, latent = span, k_TGK.shape[1], v_TGU is None
        values = k_TGK if latent else v_TGU
        self.keys = None if latent else torch.zeros(blocks, G, k_TGK.shape[2], BLOCK)
        self.values = torch.zeros(blocks, G, BLOCK, values.shape[2])
        order = torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(1)).numpy() + 1
        self.table = order[: slots * (blocks // slots - 1)].reshape(slots, -1).astype(np.int32)

    def __call__(self, computed, parts):
        """Attention of the next tokens of each sequence: queries, keys and values [n, ...]."""
        counts = np.array([len(q) for q, _, _ in parts])
        rows = np.repeat(np.arange(len(parts)), counts)
        starts = np.concatenate([[0], counts.cumsum()])
        positions = np.concatenate([past + np.arange(n)
                                    for past, n in zip(computed, counts, strict=True)])
        places = Places(self.span, self.table, np.zeros(len(parts), np.int32),
                        np.arange(len(parts)), starts, np.array(computed) + counts, rows,
                        positions, CPU)
        q, k, v = (None if parts[0][n] is None else torch.cat([part[n] for part in parts])
                   for n in range(3))
        if self.keys is not None:
            self.keys[places.blocks_N, :, :, places.offsets_N] = k
        self.values[places.blocks_N, :, places.offsets_N] = k if v is None else v
        out = paged_attention.paged_attention(q, self.keys, self.values, places,
                                              q.shape[2] ** -0.5)
        return out.split(counts.tolist())


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
            got = packed._blocked(*(x.transpose(1, 2) for x in row), 6**-0.5).transpose(1, 2)[0]
        assert (got - torch.cat(wanted)).abs().max() < 1e-5

    pages = FakePages(span, row[1][0], None if values == "keys" else row[2][0], 30, len(lengths))
    outs, done, call = [[] for _ in lengths], [0] * len(lengths), 0
    with mock.patch.multiple(paged_attention, QUERIES=block, WINDOW_QUERIES=block):
        while done != lengths:
            n = calls[call % len(calls)]
            new = [min(n, length - past) for length, past in zip(lengths, done, strict=True)]
            going = [r for r, own in enumerate(new) if own]
            parts = [[None if x is None else x[done[r] : done[r] + new[r]] for x in
                      (*documents[r][:2], None if values == "keys" else documents[r][2])]
                     for r in going]
            pages.table, table = pages.table[going], pages.table
            for r, out in zip(going, pages([done[r] for r in going], parts), strict=True):
                outs[r].append(out)
                done[r] += new[r]
            pages.table, call = table, call + 1
    for own, want in zip(outs, wanted, strict=True):
        assert (torch.cat(own) - want).abs().max() < 1e-5


def test_a_sequence_is_padded_by_its_own_length_alone():
    """So that sums are taken in the same order whatever else is in the batch."""
    span, table = Span(), np.arange(1, 401, dtype=np.int32).reshape(4, 100)

    def groups(lengths):
        n = len(lengths)
        return Places(span, table, np.zeros(n, np.int32), np.arange(n), np.arange(n + 1),
                      np.array(lengths), np.arange(n), np.array(lengths) - 1, CPU).groups

    assert [group.tables.shape[1] for group in groups([16, 17, 80, 1600])] == [1, 2, 6, 128]
    assert [group.tables.shape[1] for group in groups([80])] == [6]


def test_layers_without_attention_need_no_pages():
    def network(tokens, positions, attend):
        return torch.zeros(*tokens.shape, 3)

    made = torch.nn.Linear(3, 3)
    made.forward, made.lm_head, made.config = network, made, SimpleNamespace(vocab_size=3)
    rows = PagedRows(made, 2)
    assert rows.pages.keys == [] and rows.blocks.used == 0
