from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from vicugna.evals.results import interval


@pytest.mark.parametrize("right, n", [(0, 1), (1, 1), (0, 30), (29, 30), (500, 1000)])
def test_independent_items_get_wilsons_interval(right: int, n: int) -> None:
    low, high, method = interval([k < right for k in range(n)], [str(k) for k in range(n)])
    assert (low, high) == pytest.approx(stats.binomtest(right, n).proportion_ci(method="wilson"))
    assert method == "wilson" and 0 <= low <= right / n <= high <= 1


def test_clustered_interval_by_hand() -> None:
    """Figures of statsmodels 0.15: OLS on a constant with cov_type="cluster", without corrections,
    and proportion_confint(method="wilson") at the effective number of items."""
    rng = np.random.default_rng(0)
    member = rng.integers(0, 25, 300)
    right = rng.random(300) < rng.random(25)[member]
    low, high, method = interval(list(right), [str(k) for k in member])
    assert method == "clustered"
    assert (low, high) == pytest.approx((0.3532534693, 0.5901244793), abs=1e-9)
    residuals = [(right - right.mean())[member == k].sum() for k in range(25)]
    variance = np.square(residuals).sum() / 300 ** 2
    assert high - low == pytest.approx(2 * stats.t.isf(0.025, 24) * variance ** 0.5, rel=0.1)


@pytest.mark.parametrize("size, least", [(1, 0.93), (5, 0.92)])
def test_intervals_cover_what_they_promise(size: int, least: float) -> None:
    """Clusters of 1 (independent) and of 5 items that share half of their luck."""
    rng, covered, p = np.random.default_rng(1), 0, 0.8
    names = [str(k // size) for k in range(60 * size)]
    for _ in range(500):
        shared = np.repeat(rng.random(60), size)
        own = rng.random(60 * size)
        luck = np.where(rng.random(60 * size) < (0.5 if size > 1 else 0), shared, own)
        low, high, _ = interval(list(luck < p), names)
        covered += low <= p <= high
    assert least <= covered / 500 <= 0.98


def test_clusters_widen_and_never_pretend_certainty() -> None:
    right = [k % 4 != 0 for k in range(80)]
    alone = interval(right, [str(k) for k in range(80)])
    together = interval(right, [str(right[k]) + str(k % 8) for k in range(80)])
    assert together[2] == "clustered"
    assert together[1] - together[0] > alone[1] - alone[0]
    all_right = interval([True] * 80, [str(k // 10) for k in range(80)])
    assert all_right[0] == pytest.approx(
        stats.binomtest(8, 8).proportion_ci(method="wilson").low)
    assert interval([True, False], ["a", "a"]) == (0.0, 1.0, "clustered")
