"""Attention over pages by the CPU kernels, against exact attention over the keys in order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba")

from vicugna.engine.cpu import attention

WIDTHS = {"separate": (6, 2, 48, 64), "shared": (4, 1, 96, 96)}  # H, G, K, U


class Case:
    """Sequences with their keys in pages in random order; the last `counts` tokens are queries."""

    def __init__(self, kind: str, lengths: list[int], counts: list[int], window: int | None,
                 chunk: int | None, dtype: torch.dtype = torch.float32, dropped: int = 0) -> None:
        torch.manual_seed(sum(lengths))
        self.H, self.G, self.K, self.U = WIDTHS[kind]
        self.lengths, self.counts, self.window, self.chunk = lengths, counts, window, chunk
        blocks = [-(-length // 16) for length in lengths]
        order, at = torch.randperm(sum(blocks)).tolist(), np.cumsum([0, *blocks])
        self.tables = np.zeros((len(lengths), max(blocks)), np.int32)
        for r, n in enumerate(blocks):  # the first `dropped` blocks have been given back
            self.tables[r, : n - dropped] = order[at[r] + dropped : at[r + 1]]
        self.first = np.full(len(lengths), dropped)
        self.order = [order[at[r] : at[r + 1]] for r in range(len(lengths))]
        self.values = torch.randn(sum(blocks), self.G, 16, self.U).to(dtype)
        self.keys = (torch.randn(sum(blocks), self.G, self.K, 16).to(dtype)
                     if kind == "separate" else None)
        self.starts = np.cumsum([0, *counts])
        self.q = torch.randn(int(self.starts[-1]), self.H, self.K)

    def run(self, r: int | None = None, query: int = 0) -> Tensor:
        """Of all queries; or of one query of sequence r, alone."""
        q, starts, lengths = self.q, self.starts, np.array(self.lengths)
        tables, first = self.tables, self.first
        if r is not None:
            row = int(starts[r]) + query
            lengths = lengths[r : r + 1] - self.counts[r] + query + 1
            q, starts = q[row : row + 1], np.array([0, 1])
            tables, first = tables[r : r + 1], first[r : r + 1]
        return attention.paged(q, self.keys, self.values, starts, lengths, tables, first,
                               self.window, self.chunk, self.K**-0.5)

    def exact(self, r: int, query: int) -> Tensor:
        """In float64."""
        length = self.lengths[r]
        v_GSU = self.values[self.order[r]].transpose(0, 1).flatten(1, 2).double()
        k_GSK = v_GSU if self.keys is None else (
            self.keys[self.order[r]].permute(1, 0, 3, 2).flatten(1, 2).double())
        last = length - self.counts[r] + query
        first = max(0, last - self.window + 1) if self.window else 0
        if self.chunk:
            first = max(first, last // self.chunk * self.chunk)
        q_GhK = self.q[int(self.starts[r]) + query].double().view(self.G, -1, self.K)
        score = q_GhK @ k_GSK[:, first : last + 1].transpose(1, 2) * self.K**-0.5
        return (score.softmax(-1) @ v_GSU[:, first : last + 1]).reshape(self.H, self.U)

    def check(self) -> None:
        """All queries together: near the exact result, and the bits of each alone."""
        out = self.run()
        for r, count in enumerate(self.counts):
            for query in range(count):
                row = out[int(self.starts[r]) + query]
                torch.testing.assert_close(row.double(), self.exact(r, query), atol=1e-5, rtol=1e-4)
                assert torch.equal(row, self.run(r, query)[0])


@settings(max_examples=15, deadline=None)
@given(kind=st.sampled_from(sorted(WIDTHS)), data=st.data(),
       span=st.sampled_from([(None, None), (20, None), (None, 64), (600, None)]))
def test_any_batch_of_sequences(
        kind: str, data: st.DataObject, span: tuple[int | None, int | None]) -> None:
    lengths = data.draw(st.lists(st.integers(1, 90) | st.integers(500, 1100), min_size=1,
                                 max_size=4))
    counts = [data.draw(st.integers(1, min(length, 9))) for length in lengths]
    Case(kind, lengths, counts, *span).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pages_of_half_precision(dtype: torch.dtype) -> None:
    Case("separate", [700, 33], [2, 5], None, None, dtype).check()


def test_blocks_before_the_window_have_been_given_back() -> None:
    Case("separate", [200, 180], [1, 3], 40, None, dropped=5).check()


def test_what_is_not_a_number_stays_so() -> None:
    case = Case("separate", [40], [1], None, None)
    case.q[0, 0] = float("nan")
    out = case.run()
    assert bool(out[0, 0].isnan().all())
    assert bool(out[0, 1:].isfinite().all())


def test_which_pages_it_takes() -> None:
    pages = torch.zeros(1, 1, 16, 32)
    assert attention.takes(None, pages)
    assert not attention.takes(None, pages[..., :24])
    assert not attention.takes(None, pages.double())
