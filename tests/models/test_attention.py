"""`Dense` equals the plain sum over visible keys, in memory that does not grow with its square."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vicugna.models.layers.attention import WIDE, Dense
from vicugna.models.layers.mask import Span


def plain(q, k, v, positions_BT, window):
    """softmax(q k / sqrt(K)) v over the keys of the same document and window, one by one."""
    T, share = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(share, dim=2) for x in (k, v))
    at = torch.arange(T)
    apart = at[:, None] - at
    visible = (apart >= 0) & (apart <= positions_BT[:, :, None]) & (apart < window)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[3] ** -0.5
    p = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshk->bthk", p, v)


@pytest.mark.parametrize("widths", [(8, 8), (12, 8), (8, 12)], ids=str)
@pytest.mark.parametrize("window", [WIDE - 1, WIDE + 1, 2 * WIDE + 50, None])
@pytest.mark.parametrize("packed", [False, True])
def test_every_window_and_width_equals_the_plain_sum(packed, window, widths):
    T, (K, U) = 3 * WIDE + 9, widths
    torch.manual_seed(0)
    inputs = [torch.randn(2, T, heads, width, requires_grad=True)
              for heads, width in ((4, K), (2, K), (2, U))]
    positions = torch.arange(T).expand(2, T)
    if packed:
        positions = torch.stack([torch.cat([torch.arange(n) for n in lengths])
                                 for lengths in ((5, T - 5), (2 * WIDE + 3, T - 2 * WIDE - 3))])
    got = Dense(positions)(0, *inputs, Span(window))
    due = plain(*inputs, positions, window or T)
    torch.testing.assert_close(got, due, atol=1e-5, rtol=1e-4)
    cotangent = torch.randn_like(due)
    for mine, theirs in zip(torch.autograd.grad(got, inputs, cotangent),
                            torch.autograd.grad(due, inputs, cotangent), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("span,values", [(Span(1024), 8), (Span(), 4), (Span(), 12)], ids=str)
def test_no_matrix_of_all_scores_is_made(span, values):
    T, H = 4096, 2
    q, k = torch.randn(2, 1, T, H, 8).unbind()
    with torch.no_grad(), Largest() as largest:
        Dense()(0, q, k, torch.randn(1, T, H, values), span)
    assert largest.elements < T * T / 8


class Operations(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
def test_mixed_precision_goes_by_blocks(packed):
    """Under autocast RoPE leaves queries and keys in float32, while values are bfloat16."""
    T = 300
    torch.manual_seed(0)
    q, k = torch.randn(2, T, 4, 8), torch.randn(2, T, 2, 8)
    v = torch.randn(2, T, 2, 8, dtype=torch.bfloat16)
    lengths = (70, T - 70) if packed else (T,)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, T)
    with torch.autocast("cpu", torch.bfloat16), Operations() as operations:
        got = Dense(positions)(0, q, k, v, Span())
    assert not any("scaled_dot_product" in name for name in operations.names)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), plain(q, k, v.float(), positions, T), atol=0.03, rtol=0)


@pytest.mark.parametrize("span", [Span(), Span(window=3), Span(window=40), Span(window=400)],
                         ids=str)
def test_rows_may_start_at_any_position(span):
    """Positions that begin above 0 are one document, whose earlier part is not there."""
    q, k, v = torch.randn(3, 1, 600, 2, 8).unbind()
    late = torch.arange(600)[None] + 1000
    torch.testing.assert_close(Dense(late)(0, q, k, v, span), Dense()(0, q, k, v, span))
