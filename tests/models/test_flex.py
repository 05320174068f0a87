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
    masked, sparse = Dense(places), Dense(places)
    sparse._flex = uncompiled
    due, got = (attend(0, *inputs, span) for attend in (masked, sparse))
    assert bool(sparse._block_masks) == (packed or span.window in (1, 90))
    torch.testing.assert_close(got, due, atol=1e-5, rtol=1e-4)
    cotangent = torch.randn_like(due)
    for mine, theirs in zip(torch.autograd.grad(got, inputs, cotangent),
                            torch.autograd.grad(due, inputs, cotangent), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_one_mask_a_pattern_and_none_for_narrow_heads():
    attend, x = Dense(positions([40, 60])), torch.randn(1, 100, 2, 16)
    attend._flex = uncompiled
    for layer in range(4):
        attend(layer, x, x, x, Span(window=9) if layer % 2 else Span())
    assert attend._block_masks.keys() == {Span(), Span(window=9)}
    narrow = torch.randn(1, 100, 2, 8)  # which Triton cannot multiply
    torch.testing.assert_close(attend(0, narrow, narrow, narrow, Span()),
                               Dense(positions([40, 60]))(0, narrow, narrow, narrow, Span()))


def test_mixed_precision_has_one_dtype():
    """Under autocast RoPE leaves queries and keys in float32, while values are bfloat16."""
    attend, q = Dense(positions([40, 60])), torch.randn(1, 100, 2, 16)
    attend._flex = uncompiled
    assert attend(0, q, q, q.bfloat16(), Span()).dtype == torch.bfloat16


def test_memory_grows_with_the_blocks_alone():
    T = 2**17
    first = torch.arange(T)[None] // 5000 * 5000
    mask = flex.block_mask(first)
    assert mask.kv_indices.numel() == (T // flex.BLOCK) ** 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_kernel():
    assert flex.kernel() is None
