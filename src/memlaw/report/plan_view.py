"""The plan on the page: the law of recall as a table that the page's script interpolates in."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from memlaw.law.estimator import LawError
from memlaw.law.recall_law import RecallLaw
from memlaw.law.rows import CellRow, number

_Z = [z / 4 for z in range(-12, 14)]  # probabilities from 0.0013 to 0.9994
_BEYOND, _LENGTHS, _SIZES = 8, 33, 60  # of the table


@dataclass(frozen=True, kw_only=True)
class PlanView:
    """The law of recall, as the page's calculator needs it: a table to interpolate in.

    Shapes: T lengths, Z standard normal quantiles.

    Attributes:
        log_tokens: [T] increasing: ln of a number of target tokens.
        z: [Z] increasing: Φ⁻¹ of the probability of a certificate.
        log_rank: [T, Z]: ln of the (fractional) rank that has this probability.
        parameters_per_rank: trained parameters for each unit of rank.
        tokens, ranks: lowest and highest that were measured; outside, the law extrapolates.
        bytes_per_parameter: of an adapter on disk.
    """

    log_tokens: Sequence[float]
    z: Sequence[float]
    log_rank: Sequence[Sequence[float]]
    parameters_per_rank: float
    tokens: tuple[int, int]
    ranks: tuple[int, int]
    bytes_per_parameter: int = 4

    def rank(self, n_tokens: float, confidence: float) -> int:
        """The smallest rank with this probability of a certificate, as the page computes it.

        Args:
            n_tokens: target tokens, > 0.
            confidence: the probability, in (0, 1).
        """
        column = self._at(n_tokens)
        return max(1, math.ceil(math.exp(_along(NormalDist().inv_cdf(confidence), self.z, column))))

    def probability(self, rank: float, n_tokens: float) -> float:
        """The probability that an adapter of this rank is certified on this many target tokens."""
        return NormalDist().cdf(_along(math.log(rank), self._at(n_tokens), self.z))

    def _at(self, n_tokens: float) -> list[float]:
        columns = zip(*self.log_rank, strict=True)
        return [_along(math.log(n_tokens), self.log_tokens, column) for column in columns]


def _along(at: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Linear interpolation in (xs, ys), which goes straight on beyond the ends."""
    i = min(max(bisect_right(xs, at), 1), len(xs) - 1)
    return ys[i - 1] + (at - xs[i - 1]) * (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])


def plan_of(cells: Sequence[CellRow]) -> PlanView | None:
    """The law of recall, fitted to cells of one setting; None where it can't be."""
    try:
        law = RecallLaw().fit_cells(cells)
        per_rank = {number(cell, "n_parameters") / cell["rank"] for cell in cells}
    except LawError:
        return None
    if max(per_rank) > 1.001 * min(per_rank):
        return None
    ranks, tokens = ([int(cell[column]) for cell in cells] for column in ("rank", "n_tokens"))
    ends = [NormalDist().cdf(z) for z in (_Z[0], _Z[-1])]
    lengths = np.geomspace(min(tokens) / _BEYOND, max(tokens) * _BEYOND, _LENGTHS)
    table = []
    for n in lengths:
        low, high = (math.log(law.size_quantile(n, p)) for p in ends)
        sizes = np.linspace(low, high, _SIZES)
        p = law.probability(np.column_stack([np.exp(sizes), np.full(len(sizes), n)]))
        z = [NormalDist().inv_cdf(min(max(float(q), 1e-9), 1 - 1e-9)) for q in p]
        table.append(np.interp(_Z, z, sizes).round(5).tolist())
    return PlanView(
        log_tokens=np.log(lengths).tolist(),
        z=_Z,
        log_rank=table,
        parameters_per_rank=min(per_rank),
        tokens=(min(tokens), max(tokens)),
        ranks=(min(ranks), max(ranks)),
    )
