"""Confidence intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean."""
    from scipy.special import stdtrit

    n = len(values)
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    half = float(stdtrit(n - 1, 0.975)) * (variance / n) ** 0.5
    return mean - half, mean + half


def share_interval(n_found: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, n_found of n; 0 to 1 where n is 0."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    middle = (n_found + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (n_found * (n - n_found) / n + z * z / 4) ** 0.5
    low = 0.0 if n_found == 0 else middle - half
    return low, 1.0 if n_found == n else middle + half


def highest(intervals: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The highest low and the highest high end of at least one interval."""
    lows, highs = zip(*intervals, strict=True)
    return max(lows), max(highs)
