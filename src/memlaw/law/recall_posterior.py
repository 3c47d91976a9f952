"""The posterior of the recall law, summed over a grid.

Thresholds, the smallest sizes that certify a data set, lie around a line in logarithms:

    ln s* = m(ℓ) + ω e,   e ~ N(0, 1),   m(ℓ) = ln s0 + γ ln(ℓ/ℓ0) + κ (ln(ℓ/ℓ0) / h)²

ℓ0 is the geometric mean of the lengths, h the half range of their logarithms.

Legend: n cells, G data sets, U distinct (size, length) pairs, Q points of the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from memlaw.law.estimator import Array, LawError

# The priors, weak beside a grid that brackets thresholds at several lengths.
GAMMA_PRIOR = (1.0, 0.5)  # mean and sd; capacity says 1: twice the tokens, twice the size
BEND_PRIOR = (0.0, 0.2)  # κ: at the shortest and longest length m is off the line by so much
SPREAD_PRIOR = (math.log(0.1), 0.8)  # of ln ω: thresholds differ by 10 % between data sets
SLIP = 0.02  # chance that a cell comes out on the wrong side of its data set's threshold
_NAMES = ("size_at_centre", "gamma", "bend", "spread")  # of the columns of the points
_POINTS = (31, 15, 9, 11)  # of the grid over ln s0, γ, κ, ln ω
_HUGE_LOG = 300.0
_ROUNDS = 3


@dataclass(frozen=True)
class Brackets:
    """What cells say of the thresholds of their data sets.

    The likelihood of data set g is rest[g] + Σ_u weights[g, u] · P(threshold at or below pair u).

    Attributes:
        pairs: [U, 2]: ln size and ln n_tokens.
        weights: [G, U].
        rest: [G].
        n_contradictions: cells that fail at a size at or above one that certifies on their data.
    """

    pairs: Array
    weights: Array
    rest: Array
    n_contradictions: int


def brackets_of(logs: Array, certified: Array, labels: Array) -> Brackets:
    """Bracket each data set's threshold by the sizes tried on it.

    The likelihood sums over the gaps between a data set's sizes: the chance that the threshold lies
    in the gap, times (1 − slip) for each cell on the side it should be, slip for each that is not.

    Args:
        logs: [n, 2]: ln size and ln n_tokens.
        certified: [n] bool.
        labels: [n]: of data sets.

    Raises:
        LawError: cells of one data set differ in n_tokens.
    """
    pairs, index = np.unique(logs, axis=0, return_inverse=True)
    index = index.reshape(-1)
    names = np.unique(labels)
    weights, rest = np.zeros((len(names), len(pairs))), np.zeros(len(names))
    n_contradictions = 0
    for g, name in enumerate(names):
        rows = np.flatnonzero(labels == name)
        if np.ptp(logs[rows, 1]) > 0:
            raise LawError(f"The cells of group {str(name)!r} differ in n_tokens; they share data.")
        rows = rows[np.argsort(logs[rows, 0], kind="stable")]
        hits = certified[rows]
        # gap j: the threshold is above the first j sizes, at or under the rest
        wrong = [int(hits[:j].sum() + (~hits[j:]).sum()) for j in range(len(rows) + 1)]
        chance = np.array([SLIP**w * (1 - SLIP) ** (len(rows) - w) for w in wrong])
        rest[g] = chance[-1]
        np.add.at(weights[g], index[rows], chance[:-1] - chance[1:])
        lowest = logs[rows, 0][hits].min() if hits.any() else math.inf
        n_contradictions += int((~hits & (logs[rows, 0] >= lowest)).sum())
    return Brackets(pairs, weights, rest, n_contradictions)


class Posterior:
    """The posterior of ln s0, γ, κ and ln ω under the module's priors.

    The grid is narrowed around the posterior in a few rounds; there is no sampling.

    Args:
        brackets: what the cells say of the thresholds.
        logs: [n, 2]: ln size and ln n_tokens of the cells.

    Attributes:
        centre: ln ℓ0.
    """

    def __init__(self, brackets: Brackets, logs: Array) -> None:
        self.centre = float(np.unique(logs[:, 1]).mean())
        half = float(np.ptp(logs[:, 1])) / 2
        self._half = half if half > 0 else 1.0
        self._points, self._mass = self._summed(brackets, logs[:, 0])

    def _summed(self, brackets: Brackets, log_sizes: Array) -> tuple[Array, Array]:
        """Points [Q, 4] and their mass [Q]."""
        wide = 2.0 + float(np.ptp(log_sizes))
        low = np.array([log_sizes.min() - wide, 0.0, -4 * BEND_PRIOR[1], math.log(0.005)])
        high = np.array([log_sizes.max() + wide, 3.0, 4 * BEND_PRIOR[1], math.log(3.0)])
        for _ in range(_ROUNDS):
            axes = [
                np.linspace(a, b, n) if b > a else np.array([a])
                for a, b, n in zip(low, high, _POINTS, strict=True)
            ]
            points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 4)
            log_mass = -0.5 * sum(
                ((points[:, i] - mean) / sd) ** 2
                for i, (mean, sd) in ((1, GAMMA_PRIOR), (2, BEND_PRIOR), (3, SPREAD_PRIOR))
            )
            phi = ndtr(self._z(points, brackets.pairs))
            likelihood = phi @ brackets.weights.T + brackets.rest
            log_mass = log_mass + np.log(np.maximum(likelihood, 1e-300)).sum(axis=1)
            mass = np.exp(log_mass - log_mass.max())
            mass /= mass.sum()
            cube = mass.reshape([len(axis) for axis in axes])
            self._marginals = [
                (axis, cube.sum(axis=tuple(j for j in range(4) if j != i)))
                for i, axis in enumerate(axes)
            ]
            for i, (axis, marginal) in enumerate(self._marginals):
                inside = np.flatnonzero(marginal > 1e-4 * marginal.max())
                low[i] = axis[max(inside[0] - 1, 0)]
                high[i] = axis[min(inside[-1] + 1, len(axis) - 1)]
        kept = mass > 1e-6 * mass.max()
        return points[kept], mass[kept] / mass[kept].sum()

    def _middle(self, points: Array, log_tokens: Array) -> Array:
        """m(ℓ): [Q, U]."""
        away = log_tokens - self.centre
        bend = (away / self._half) ** 2
        return points[:, :1] + points[:, 1:2] * away + points[:, 2:3] * bend

    def _z(self, points: Array, logs: Array) -> Array:
        """(ln s − m(ℓ)) / ω: [Q, U], for logs [U, 2]."""
        return (logs[:, 0] - self._middle(points, logs[:, 1])) * np.exp(-points[:, 3:4])

    def summary(self, confidence: float) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """Medians, and central intervals (low, high), of s0, γ, κ and ω by name."""
        tails = _tails(confidence)
        medians, intervals = {}, {}
        for i, name in enumerate(_NAMES):
            axis, mass = self._marginals[i]
            edges = np.concatenate([axis[:1], (axis[1:] + axis[:-1]) / 2, axis[-1:]])
            at = (tails[0], 0.5, tails[1])
            ends = np.interp(at, np.concatenate([[0.0], np.cumsum(mass)]), edges)
            if i in (0, 3):
                ends = np.exp(ends)
            medians[name] = float(ends[1])
            intervals[name] = (float(ends[0]), float(ends[2]))
        return medians, intervals

    def probability(self, logs: Array) -> Array:
        """The mean of Φ((ln s − m(ℓ)) / ω) at logs [n, 2]: [n] in [0, 1]."""
        return self._mass @ ndtr(self._z(self._points, logs))

    def probability_interval(self, logs: Array, confidence: float) -> Array:
        """The central interval of the same Φ at logs [n, 2]: [n, 2] in [0, 1]."""
        phi = ndtr(self._z(self._points, logs))
        tails = _tails(confidence)
        return np.array([_quantiles(column, self._mass, tails) for column in phi.T])

    def size_quantile(self, log_tokens: float, probability: float) -> float:
        """The size at which `probability` has this value, by bisection."""
        middle = self._middle(self._points, np.array([log_tokens]))[:, 0]
        spread = np.exp(self._points[:, 3])
        low, high = float((middle - 9 * spread).min()), float((middle + 9 * spread).max())
        for _ in range(60):
            at = (low + high) / 2
            if self._mass @ ndtr((at - middle) / spread) < probability:
                low = at
            else:
                high = at
        return math.exp(min(high, _HUGE_LOG))


def _tails(confidence: float) -> tuple[float, float]:
    return (1 - confidence) / 2, (1 + confidence) / 2


def _quantiles(values: Array, mass: Array, tails: Sequence[float]) -> list[float]:
    order = np.argsort(values)
    done = np.cumsum(mass[order]) - mass[order] / 2
    return [float(q) for q in np.interp(tails, done, values[order])]
