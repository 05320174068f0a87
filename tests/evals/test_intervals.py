from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.api import OLS
from statsmodels.stats.proportion import proportion_confint

from vicugna.evals.results import interval


@pytest.mark.parametrize("right, n", [(0, 1), (1, 1), (0, 30), (29, 30), (500, 1000)])
def test_independent_items_get_wilsons_interval(right: int, n: int) -> None:
    low, high, method = interval([k < right for k in range(n)], [str(k) for k in range(n)])
    assert (low, high) == pytest.approx(proportion_confint(right, n, 0.05, "wilson"))
    assert method == "wilson" and 0 <= low <= right / n <= high <= 1


def test_clustered_variance_is_that_of_statsmodels() -> None:
    rng = np.random.default_rng(0)
    member = rng.integers(0, 25, 300)
    right = rng.random(300) < rng.random(25)[member]
    fit = OLS(right.astype(float), np.ones(300)).fit(cov_type="cluster", cov_kwds={
        "groups": member, "use_correction": False, "df_correction": False})
    p, effective = right.mean(), right.mean() * (1 - right.mean()) / fit.bse[0] ** 2
    alpha = 2 * stats.norm.sf(stats.t.isf(0.025, len(np.unique(member)) - 1))
    low, high, method = interval(list(right), [str(k) for k in member])
    assert (low, high) == pytest.approx(proportion_confint(
        p * effective, effective, alpha, method="wilson"))
    assert method == "clustered"


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
    assert all_right[0] == pytest.approx(proportion_confint(8, 8, 0.05, "wilson")[0])
    assert interval([True, False], ["a", "a"]) == (0.0, 1.0, "clustered")
