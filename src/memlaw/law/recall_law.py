"""Recall as a function of size and length: does a cell certify, and how many tokens fall short.

`RecallLaw` is about a sharp transition. Every data set has a threshold, the smallest size that
certifies it; a grid of sizes brackets it. Thresholds of many data sets lie around a line:

    ln s* = m(ℓ) + ω e,   e ~ N(0, 1),   m(ℓ) = ln s0 + γ ln(ℓ/ℓ0) + κ (ln(ℓ/ℓ0) / h)²

so that P(certified | s, ℓ) = Φ((ln s − m(ℓ)) / ω): a probit in ln s and ln ℓ with a bend. ℓ0 is the
geometric mean of the lengths, h the half range of their logarithms.

Legend: n cells, G data sets, U distinct (size, length) pairs, Q points of the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, ndtr, stdtrit

from memlaw.law.memory_law import (
    Array,
    Cell,
    Covariate,
    Estimator,
    LawError,
    cell_arrays,
    checked_rows,
    choose_cells,
    number,
)

Measure = Literal["records", "tokens"]

# The priors of RecallLaw, weak beside a grid that brackets thresholds at several lengths.
GAMMA_PRIOR = (1.0, 0.5)  # mean and sd; capacity says 1: twice the tokens, twice the size
BEND_PRIOR = (0.0, 0.2)  # κ: at the shortest and longest length m is off the line by so much
SPREAD_PRIOR = (math.log(0.1), 0.8)  # of ln ω: thresholds differ by 10 % between data sets
SLIP = 0.02  # chance that a cell comes out on the wrong side of its data set's threshold
_POINTS = (31, 15, 9, 11)  # of the grid over ln s0, γ, κ, ln ω
_HUGE_LOG = 300.0
_ROUNDS = 3


class RecallLaw(Estimator):
    """P(a cell is certified), with each data set's threshold bracketed by the sizes tried on it.

    The likelihood of a data set sums over the gaps between its sizes: the chance that the threshold
    lies in the gap, times (1 − slip) for each cell on the side it should be, slip for each that is
    not. Complete separation, every data set with the same clean step, is no trouble: the threshold
    is then known to within a gap, and the spread to within its prior. The posterior under the
    module's priors is summed over a grid that is narrowed around it; there is no sampling.

    Args:
        covariate: what `fit_cells` takes for the size: rank, or trainable parameters.
        confidence: of the intervals, in (0, 1).

    Attributes:
        params_: posterior medians: size_at_centre (s0), gamma (γ), bend (κ), spread (ω).
        intervals_: (low, high) by name: central posterior intervals.
        centre_tokens_: ℓ0.
        n_groups_: data sets.
        n_contradictions_: cells that fail at a size at or above one that certifies on their data.

    Source: ours.
    """

    params_: dict[str, float]
    intervals_: dict[str, tuple[float, float]]
    centre_tokens_: float
    n_groups_: int
    n_contradictions_: int

    def __init__(self, covariate: Covariate = "rank", confidence: float = 0.95) -> None:
        self.covariate = covariate
        self.confidence = confidence

    def fit_cells(
        self, cells: Sequence[Cell], *, recall: float = 1.0, measure: Measure = "records"
    ) -> RecallLaw:
        """Fit to cells of a probe.

        Args:
            cells: flat dicts, all of one task and setting.
            recall, measure: what counts as success; see `reached`.

        Returns:
            self.

        Raises:
            LawError: as `cell_arrays`, `reached` and `fit`.
        """
        X, _, _, groups = cell_arrays(cells, self.covariate)
        return self.fit(X[:, :2], reached(cells, recall, measure), groups)

    def fit(self, X: ArrayLike, certified: ArrayLike, groups: ArrayLike | None = None) -> RecallLaw:
        """Fit to arrays.

        Args:
            X: [n, 2] float > 0: size, n_tokens.
            certified: [n] bool.
            groups: [n] labels of the data that cells were trained on. None: each cell is its own.

        Returns:
            self.

        Raises:
            LawError: arrays that don't fit together; all cells certify, or none does; cells of one
                group differ in n_tokens.
        """
        X, hit = _checked_pairs(X), np.asarray(certified, dtype=bool)
        labels = np.arange(len(X)).astype(str) if groups is None else np.asarray(groups).astype(str)
        for values, name in ((hit, "certified"), (labels, "groups")):
            if values.shape != (len(X),):
                raise LawError(f"{name} has shape {values.shape}; it must be ({len(X)},).")
        if hit.all() or not hit.any():
            which, mend = (
                ("Every cell certifies", "smaller sizes or longer targets")
                if hit.all()
                else ("No cell certifies", "larger sizes, shorter targets, or more steps")
            )
            raise LawError(f"{which}: the grid has no transition to fit. Probe {mend}.")
        logs = np.log(X)
        self._centre = float(np.unique(logs[:, 1]).mean())
        half = float(np.ptp(logs[:, 1])) / 2
        self._half = half if half > 0 else 1.0
        self.centre_tokens_ = math.exp(self._centre)
        pairs, weights, rest = self._brackets(logs, hit, labels)
        self.n_groups_ = len(rest)
        self._points, self._mass = self._posterior(pairs, weights, rest, logs[:, 0])
        self._summarise()
        return self

    def _brackets(self, logs: Array, hit: Array, labels: Array) -> tuple[Array, Array, Array]:
        """The likelihood of group g is rest[g] + Σ_u weights[g, u] · Φ_u, over pairs [U, 2]."""
        pairs, index = np.unique(logs, axis=0, return_inverse=True)
        index = index.reshape(-1)
        names = np.unique(labels)
        weights, rest = np.zeros((len(names), len(pairs))), np.zeros(len(names))
        self.n_contradictions_ = 0
        for g, name in enumerate(names):
            rows = np.flatnonzero(labels == name)
            if np.ptp(logs[rows, 1]) > 0:
                raise LawError(
                    f"The cells of group {str(name)!r} differ in n_tokens; they share data."
                )
            rows = rows[np.argsort(logs[rows, 0], kind="stable")]
            hits = hit[rows]
            # gap j: the threshold is above the first j sizes, at or under the rest
            wrong = [int(hits[:j].sum() + (~hits[j:]).sum()) for j in range(len(rows) + 1)]
            chance = np.array([SLIP**w * (1 - SLIP) ** (len(rows) - w) for w in wrong])
            rest[g] = chance[-1]
            np.add.at(weights[g], index[rows], chance[:-1] - chance[1:])
            lowest = logs[rows, 0][hits].min() if hits.any() else math.inf
            self.n_contradictions_ += int((~hits & (logs[rows, 0] >= lowest)).sum())
        return pairs, weights, rest

    def _posterior(
        self, pairs: Array, weights: Array, rest: Array, log_sizes: Array
    ) -> tuple[Array, Array]:
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
            phi = ndtr(self._z(points, pairs))
            log_mass = log_mass + np.log(np.maximum(phi @ weights.T + rest, 1e-300)).sum(axis=1)
            mass = np.exp(log_mass - log_mass.max())
            mass /= mass.sum()
            cube = mass.reshape([len(axis) for axis in axes])
            for i, axis in enumerate(axes):
                marginal = cube.sum(axis=tuple(j for j in range(4) if j != i))
                inside = np.flatnonzero(marginal > 1e-4 * marginal.max())
                low[i] = axis[max(inside[0] - 1, 0)]
                high[i] = axis[min(inside[-1] + 1, len(axis) - 1)]
        self._marginals = [
            (axis, cube.sum(axis=tuple(j for j in range(4) if j != i)))
            for i, axis in enumerate(axes)
        ]
        kept = mass > 1e-6 * mass.max()
        return points[kept], mass[kept] / mass[kept].sum()

    def _middle(self, points: Array, log_tokens: Array) -> Array:
        """m(ℓ): [Q, U]."""
        away = log_tokens - self._centre
        bend = (away / self._half) ** 2
        return points[:, :1] + points[:, 1:2] * away + points[:, 2:3] * bend

    def _z(self, points: Array, logs: Array) -> Array:
        """(ln s − m(ℓ)) / ω: [Q, U], for logs [U, 2]."""
        return (logs[:, 0] - self._middle(points, logs[:, 1])) * np.exp(-points[:, 3:4])

    def _summarise(self) -> None:
        tails = ((1 - self.confidence) / 2, 0.5, (1 + self.confidence) / 2)
        self.params_, self.intervals_ = {}, {}
        for i, name in enumerate(("size_at_centre", "gamma", "bend", "spread")):
            axis, mass = self._marginals[i]
            edges = np.concatenate([axis[:1], (axis[1:] + axis[:-1]) / 2, axis[-1:]])
            ends = np.interp(tails, np.concatenate([[0.0], np.cumsum(mass)]), edges)
            if i in (0, 3):
                ends = np.exp(ends)
            self.params_[name] = float(ends[1])
            self.intervals_[name] = (float(ends[0]), float(ends[2]))

    def probability(self, X: ArrayLike) -> Array:
        """P(certified) for data not seen yet: [n] in [0, 1], the posterior mean of Φ.

        Args:
            X: [n, 2] float > 0: size, n_tokens.

        Raises:
            LawError: not fitted, or X isn't as it should be.
        """
        self._fitted("params_")
        return self._mass @ ndtr(self._z(self._points, np.log(_checked_pairs(X))))

    def probability_interval(self, X: ArrayLike) -> Array:
        """The interval of Φ, as the law's parameters are uncertain: [n, 2].

        Args:
            X: [n, 2] float > 0: size, n_tokens.
        """
        self._fitted("params_")
        phi = ndtr(self._z(self._points, np.log(_checked_pairs(X))))
        tails = ((1 - self.confidence) / 2, (1 + self.confidence) / 2)
        return np.array([_quantiles(column, self._mass, tails) for column in phi.T])

    def predict_proba(self, X: ArrayLike) -> Array:
        """scikit-learn's form of `probability`: [n, 2], not certified and certified."""
        p = self.probability(X)
        return np.column_stack([1 - p, p])

    def predict(self, X: ArrayLike) -> Array:
        """[n] bool: certified with probability of a half or more."""
        return self.probability(X) >= 0.5

    def score(self, X: ArrayLike, certified: ArrayLike) -> float:
        """Share of cells that `predict` gets right."""
        return float((self.predict(X) == np.asarray(certified, dtype=bool)).mean())

    def size_quantile(self, n_tokens: float, probability: float) -> float:
        """The size that certifies new data of this length with this probability.

        Args:
            n_tokens: > 0.
            probability: in (0, 1).

        Returns:
            s with P(certified | s, n_tokens) = probability; a number too large for any adapter
            where a length far from the grid asks for more.
        """
        middle = self._middle(self._points, np.log([n_tokens]))[:, 0]
        spread = np.exp(self._points[:, 3])
        low, high = float((middle - 9 * spread).min()), float((middle + 9 * spread).max())
        for _ in range(60):
            at = (low + high) / 2
            if self._mass @ ndtr((at - middle) / spread) < probability:
                low = at
            else:
                high = at
        return math.exp(min(high, _HUGE_LOG))


class ShareLaw(Estimator):
    """The share of target tokens under the line, as a function of size and length.

        share = 1 / (1 + exp(−(a − b ln s + c ln ℓ)))

    fitted by fractional logit (the Bernoulli likelihood with a share for an outcome), a weak normal
    prior (sd 5 on standardised coefficients) keeping it finite where shares are all 0 or 1.
    Intervals are from the sandwich estimator, clustered by data, with its CR1 correction and
    Student's t with G − 1 degrees of freedom: nothing is assumed of how the tokens of a cell, or
    the cells on the same data, hang together.

    Args:
        covariate: what `fit_cells` takes for the size: rank, or trainable parameters.
        confidence: of the intervals, in (0, 1).

    Attributes:
        params_: a, b, c.
        intervals_: (low, high) by name.
        r2_: R² of the shares.
        n_groups_: data sets.

    Source: ours.
    """

    params_: dict[str, float]
    intervals_: dict[str, tuple[float, float]]
    r2_: float
    n_groups_: int

    def __init__(self, covariate: Covariate = "rank", confidence: float = 0.95) -> None:
        self.covariate = covariate
        self.confidence = confidence

    def fit_cells(self, cells: Sequence[Cell]) -> ShareLaw:
        """Fit to cells of a probe, all of one task and setting.

        Raises:
            LawError: as `cell_arrays` and `fit`.
        """
        X, _, _, groups = cell_arrays(cells, self.covariate)
        shares = [number(cell, "share_under") for cell in choose_cells(cells)]
        return self.fit(X[:, :2], shares, groups)

    def fit(self, X: ArrayLike, share: ArrayLike, groups: ArrayLike | None = None) -> ShareLaw:
        """Fit to arrays.

        Args:
            X: [n, 2] float > 0: size, n_tokens.
            share: [n] float in [0, 1].
            groups: [n] labels of the data that cells were trained on. None: each cell is its own.

        Returns:
            self.

        Raises:
            LawError: arrays that don't fit together; shares out of range; fewer than four groups,
                or only one size or length.
        """
        X, share = _checked_pairs(X), np.asarray(share, dtype=float)
        labels = np.arange(len(X)).astype(str) if groups is None else np.asarray(groups).astype(str)
        for values, name in ((share, "share"), (labels, "groups")):
            if values.shape != (len(X),):
                raise LawError(f"{name} has shape {values.shape}; it must be ({len(X)},).")
        if not ((share >= 0) & (share <= 1)).all():
            raise LawError("Shares must lie between 0 and 1.")
        index = np.unique(labels, return_inverse=True)[1].reshape(-1)
        self.n_groups_ = n_groups = int(index.max()) + 1
        if n_groups < 4:
            raise LawError(f"There are {n_groups} data sets; intervals need at least 4.")
        logs = np.log(X)
        centre, scale = logs.mean(axis=0), logs.std(axis=0)
        if not (scale > 0).all():
            what = "size" if scale[0] == 0 else "n_tokens"
            raise LawError(f"All cells have the same {what}. Probe a second one.")
        design = np.column_stack([np.ones(len(X)), (logs - centre) / scale])
        theta, bread = _fractional_logit(design, share)
        score = np.zeros((n_groups, 3))
        np.add.at(score, index, design * (share - expit(design @ theta))[:, None])
        n = len(X)
        correction = n_groups / (n_groups - 1) * (n - 1) / max(n - 3, 1)
        covariance = correction * bread @ (score.T @ score) @ bread
        # back from standardised columns; b counts downwards
        back = np.array(
            [
                [1.0, -centre[0] / scale[0], -centre[1] / scale[1]],
                [0.0, -1 / scale[0], 0.0],
                [0.0, 0.0, 1 / scale[1]],
            ]
        )
        values, deviation = back @ theta, np.sqrt(np.diag(back @ covariance @ back.T))
        reach = float(stdtrit(n_groups - 1, (1 + self.confidence) / 2)) * deviation
        self.params_ = dict(zip("abc", values.tolist(), strict=True))
        self.intervals_ = {
            name: (float(values[i] - reach[i]), float(values[i] + reach[i]))
            for i, name in enumerate("abc")
        }
        self.r2_ = self.score(X, share)
        return self

    def predict(self, X: ArrayLike) -> Array:
        """Expected share of tokens under the line: [n] in [0, 1].

        Args:
            X: [n, 2] float > 0: size, n_tokens.

        Raises:
            LawError: not fitted, or X isn't as it should be.
        """
        self._fitted("params_")
        logs = np.log(_checked_pairs(X))
        a, b, c = (self.params_[name] for name in "abc")
        return expit(a - b * logs[:, 0] + c * logs[:, 1])

    def score(self, X: ArrayLike, share: ArrayLike) -> float:
        """R² of `predict`; nan if all shares are the same."""
        share = np.asarray(share, dtype=float)
        spread = float(((share - share.mean()) ** 2).sum())
        return 1 - float(((share - self.predict(X)) ** 2).sum()) / spread if spread else math.nan


def reached(cells: Sequence[Cell], recall: float = 1.0, measure: Measure = "records") -> Array:
    """Which cells reach a recall.

    Args:
        cells: finished cells of one setting.
        recall: in (0, 1]. At 1: `certified`, every token over the line, teacher-forced. Below 1:
            at least that share of the records recited word for word, or, by `measure`, of the
            target tokens over the line.
        measure: records or tokens.

    Returns:
        [n] bool.

    Raises:
        LawError: recall or measure out of range; a column is missing.
    """
    if not 0 < recall <= 1:
        raise LawError(f"recall is {recall:g}; it must be above 0, and 1 at most.")
    if measure not in ("records", "tokens"):
        raise LawError(f"measure is {measure!r}; it must be records or tokens.")
    chosen = choose_cells(cells)
    if recall == 1:
        return np.array([bool(number(cell, "certified")) for cell in chosen])
    if measure == "records":
        return np.array([number(cell, "recall") >= recall - 1e-9 for cell in chosen])
    return np.array([1 - number(cell, "share_under") >= recall - 1e-9 for cell in chosen])


def _fractional_logit(design: Array, share: Array) -> tuple[Array, Array]:
    """Coefficients and the inverse of the penalised information."""
    prior = np.diag([1e-6, 1 / 25, 1 / 25])
    theta = np.zeros(design.shape[1])

    def loss(at: Array) -> float:
        eta = design @ at
        return float((np.logaddexp(0, eta) - share * eta).sum() + 0.5 * at @ prior @ at)

    for _ in range(100):
        p = expit(design @ theta)
        information = design.T @ (design * (p * (1 - p))[:, None]) + prior
        step = np.linalg.solve(information, design.T @ (share - p) - prior @ theta)
        size = 1.0
        while loss(theta + size * step) > loss(theta) + 1e-12 and size > 1e-6:
            size /= 2
        theta = theta + size * step
        if np.abs(step).max() < 1e-9:
            break
    p = expit(design @ theta)
    return theta, np.linalg.inv(design.T @ (design * (p * (1 - p))[:, None]) + prior)


def _quantiles(values: Array, mass: Array, tails: Sequence[float]) -> list[float]:
    order = np.argsort(values)
    done = np.cumsum(mass[order]) - mass[order] / 2
    return [float(q) for q in np.interp(tails, done, values[order])]


def _checked_pairs(X: ArrayLike) -> Array:
    return checked_rows(X, "size", "n_tokens")
