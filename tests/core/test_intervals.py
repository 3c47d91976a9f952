"""Confidence intervals."""

import pytest
from scipy.stats import binomtest

from memlaw.core.intervals import share_interval


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 10), (57, 200), (1, 1), (0, 1)])
def test_a_shares_interval_is_wilsons(k, n):
    meant = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert share_interval(k, n) == pytest.approx((meant.low, meant.high), abs=1e-9)


def test_of_nothing_nothing_is_known():
    assert share_interval(0, 0) == (0.0, 1.0)
