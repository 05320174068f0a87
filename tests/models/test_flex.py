"""Block-sparse attention, which training on CUDA uses, against attention through masks. Here its
mathematics run uncompiled; the blocks that the compiled kernel skips are checked one by one."""

from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import create_block_mask

from vicugna import models
from vicugna.models.layers import flex
from vicugna.models.layers.attention import Dense
from vicugna.models.layers.mask import Span

SPANS = [Span(), Span(window=1), Span(window=90), Span(window=300), Span(chunk=50),
         Span(chunk=128), Span(chunk=1)]


def positions(*rows: list[int]) -> torch.Tensor:
    """Of rows in which documents of these lengths are packed."""
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])


@settings(max_examples=60, deadline=None)
@given(T=st.integers(1, 700), cuts=st.lists(st.integers(1, 699), max_size=5),
       span=st.sampled_from(SPANS))
def test_blocks_are_those_of_the_whole_mask(T, cuts, span):
    """As PyTorch finds them from all T * T pairs: which are computed, masked within, or skipped."""
    edges = [0, *sorted({cut for cut in cuts if cut < T}), T]
    places = positions([T], [b - a for a, b in pairwise(edges)])
    first_BT = span.first_key(torch.arange(T), torch.arange(T) - places)
    got = flex.block_mask(first_BT)
    due = create_block_mask(got.mask_mod, 2, None, T, T, device="cpu")
    assert got.shape == due.shape
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("q_num_blocks", "q_indices"),
                            ("full_kv_num_blocks", "full_kv_indices"),
                            ("full_q_num_blocks", "full_q_indices")):
        n = getattr(due, counts)
        assert torch.equal(getattr(got, counts), n), counts
        used = torch.arange(getattr(due, indices).shape[-1]) < n[..., None]
        assert torch.equal(getattr(got, indices)[used], getattr(due, indices)[used]), indices


def uncompiled(q, k, v, **how):
    """FlexAttention without its kernel; PyTorch refuses gradients on a CPU, where it has them."""
    with mock.patch.object(torch_flex, "_validate_device"):
        return torch_flex.flex_attention(q, k, v, **how)


def block_sparse(places, *spans):
    """`Dense` as it is on CUDA."""
    with mock.patch.object(flex, "kernel", lambda device: uncompiled):
        return Dense(places, spans)


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("key_heads,K,U", [(4, 16, 16), (2, 16, 16), (4, 24, 16)],
                         ids=["every head its own keys", "grouped", "MLA's narrower values"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_values_and_gradients_equal_masked_attention(packed, key_heads, K, U, span):
    T = 300
    torch.manual_seed(0)
    inputs = [torch.randn(2, T, heads, width, requires_grad=True)
              for heads, width in ((4, K), (key_heads, K), (key_heads, U))]
    places = positions([T], [7, 150, 143]) if packed else positions([T], [T])
    masked, sparse = Dense(places), block_sparse(places, span)
    due, got = (attend(0, *inputs, span) for attend in (masked, sparse))
    torch.testing.assert_close(got, due, atol=1e-5, rtol=1e-4)
    cotangent = torch.randn_like(due)
    for mine, theirs in zip(torch.autograd.grad(got, inputs, cotangent),
                            torch.autograd.grad(due, inputs, cotangent), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_where_every_earlier_key_counts_no_mask_is_used():
    """One document a row, and a span that leaves nothing out: PyTorch's causal kernel."""
    attend, x = block_sparse(positions([100]), Span(), Span(window=100)), torch.randn(1, 100, 2, 16)
    with mock.patch.object(attend, "_flex", None):
        for span in (Span(), Span(window=100)):
            attend(0, x, x, x, span)


def test_other_spans_and_narrow_heads_go_through_masks():
    attend, plain = block_sparse(positions([40, 60]), Span()), Dense(positions([40, 60]))
    narrow, wide = torch.randn(1, 100, 2, 8), torch.randn(1, 100, 2, 16)
    with mock.patch.object(attend, "_flex", None):
        for x, span in ((narrow, Span()), (wide, Span(window=9))):
            assert torch.equal(attend(0, x, x, x, span), plain(0, x, x, x, span))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_mixed_precision_has_one_dtype():
    """Under autocast RoPE leaves queries and keys in float32, while values are bfloat16."""
    attend, q = block_sparse(positions([40, 60]), Span()), torch.randn(1, 100, 2, 16)
    assert attend(0, q, q, q.bfloat16(), Span()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["llama", "vicugna", "mistral", "deepseek_v3", "llama4_text"])
def test_networks_name_the_spans_of_their_layers(kind):
    """Those that training makes block masks of: no layer asks for another."""
    network = models.build({
        "model_type": kind, "vocab_size": 20, "hidden_size": 32, "intermediate_size": 8,
        "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "n_routed_experts": 16, "sliding_window": 5, "qk_rope_head_dim": 16,
        "first_k_dense_replace": 4})
    models.initialise(network, 0)
    asked = []

    class Spy(Dense):
        def __call__(self, layer, q, k, v, span, scale=None):
            asked.append(span)
            return super().__call__(layer, q, k, v, span, scale)

    network(torch.zeros(1, 3, dtype=torch.long), torch.arange(3)[None], Spy())
    assert len(asked) == 4 and set(asked) == network.model.spans


def test_memory_grows_with_the_blocks_alone():
    T = 2**17
    first = torch.arange(T)[None] // 5000 * 5000
    mask = flex.block_mask(first)
    assert mask.kv_indices.numel() == (T // flex.BLOCK) ** 2


def test_there_is_no_kernel_for_a_cpu():
    assert flex.kernel(torch.device("cpu")) is None
