"""Error bars for a share of right answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def interval(right: Sequence[bool], clusters: Sequence[str],
             confidence: float = 0.95) -> tuple[float, float, str]:
    """Confidence interval for the mean of `right`: (low, high, method), both in 0..1.

    `clusters[i]` names what item i shares with others (the same haystack, say); items whose
    cluster nobody shares are independent, and then this is Wilson's interval. Otherwise it is
    Wilson's at the effective number of items, n over the design effect, with the clustered
    variance of Miller (arXiv 2411.00640) and Student's quantile for the number of clusters. Where
    the variance cannot be estimated (all right or all wrong) each cluster counts as one item.
    """
    from scipy import stats  # both take a second, which no other command should wait
    from statsmodels.stats.proportion import proportion_confint

    hits = np.asarray(right, dtype=float)
    n, p = len(hits), float(np.mean(hits))
    names, member = np.unique(np.asarray(clusters), return_inverse=True)
    count, alpha = len(names), 1 - confidence
    if count == n:
        low, high = proportion_confint(int(hits.sum()), n, alpha, method="wilson")
        return float(low), float(high), "wilson"
    if count == 1:  # one cluster says nothing about how clusters differ
        return 0.0, 1.0, "clustered"
    effective = float(count)
    if 0 < p < 1:
        variance = clustered_variance(hits, member)
        effective = min(float(n), p * (1 - p) / variance) if variance > 0 else float(n)
        alpha = 2 * stats.norm.sf(stats.t.isf(alpha / 2, count - 1))
    low, high = proportion_confint(p * effective, effective, alpha, method="wilson")
    return float(low), float(high), "clustered"


def clustered_variance(values: np.ndarray, member: np.ndarray) -> float:
    """Variance of the mean of `values` [n] when items of one cluster, `member` [n], move together.

    The sum over clusters of the squared sum of deviations, over n squared.
    """
    sums = np.bincount(member, weights=values - values.mean())
    return float(np.square(sums).sum() / len(values) ** 2)
