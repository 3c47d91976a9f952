"""Recall as a function of size and length: is a cell certified, are all its tokens recalled?

The transition is sharp. Every data set has a threshold, the smallest size that certifies it, and a
grid of sizes brackets it. Thresholds of many data sets lie around a line in logarithms (see
`recall_posterior`), so that

    P(certified | s, ℓ) = Φ((ln s − m(ℓ)) / ω)

a probit in ln s and ln ℓ with a bend.

Legend: n cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from memlaw.law.estimator import Array, Estimator, LawError, checked_pairs
from memlaw.law.recall_posterior import Posterior, brackets_of
from memlaw.law.rows import CellRow, Covariate, cell_arrays, choose_cells, number

Measure = Literal["records", "tokens"]


class RecallLaw(Estimator):
    """P(a cell is certified), with each data set's threshold bracketed by the sizes tried on it.

    Complete separation, where every data set has the same clean step, is no problem: the threshold
    is then known to within a gap between two sizes, and the spread to within its prior. The
    posterior is summed over a grid; there is no sampling.

    Args:
        covariate: what `fit_cells` takes for the size: rank, or trainable parameters.
        confidence: of the intervals, in (0, 1).

    Attributes:
        params_: posterior medians: size_at_centre (s0), gamma (γ), bend (κ), spread (ω).
        intervals_: (low, high) by name: central posterior intervals.
        centre_tokens_: ℓ0, the geometric mean of the lengths.
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
        self, cells: Sequence[CellRow], *, recall: float = 1.0, measure: Measure = "records"
    ) -> RecallLaw:
        """Fit to cells of a probe.

        Args:
            cells: rows, all of one task and setting.
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
        X, hit = checked_pairs(X), np.asarray(certified, dtype=bool)
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
        brackets = brackets_of(logs, hit, labels)
        self._posterior = Posterior(brackets, logs)
        self.n_groups_ = len(brackets.rest)
        self.n_contradictions_ = brackets.n_contradictions
        self.centre_tokens_ = math.exp(self._posterior.centre)
        self.params_, self.intervals_ = self._posterior.summary(self.confidence)
        return self

    def probability(self, X: ArrayLike) -> Array:
        """P(certified) for data not seen yet: [n] in [0, 1], the posterior mean of Φ.

        Args:
            X: [n, 2] float > 0: size, n_tokens.

        Raises:
            LawError: not fitted, or X isn't as it should be.
        """
        self._check_fitted()
        return self._posterior.probability(np.log(checked_pairs(X)))

    def probability_interval(self, X: ArrayLike) -> Array:
        """The interval of Φ that comes from uncertain parameters: [n, 2] in [0, 1].

        Args:
            X: [n, 2] float > 0: size, n_tokens.

        Raises:
            LawError: not fitted, or X isn't as it should be.
        """
        self._check_fitted()
        return self._posterior.probability_interval(np.log(checked_pairs(X)), self.confidence)

    def predict_proba(self, X: ArrayLike) -> Array:
        """scikit-learn's form of `probability`: [n, 2]: of not certified, and of certified."""
        p = self.probability(X)
        return np.column_stack([1 - p, p])

    def predict(self, X: ArrayLike) -> Array:
        """[n] bool: certified with probability 0.5 or more."""
        return self.probability(X) >= 0.5

    def score(self, X: ArrayLike, certified: ArrayLike) -> float:
        """Share of cells that `predict` gets right, in [0, 1]."""
        return float((self.predict(X) == np.asarray(certified, dtype=bool)).mean())

    def size_quantile(self, n_tokens: float, probability: float) -> float:
        """The size that certifies new data of this length with this probability.

        Args:
            n_tokens: > 0.
            probability: in (0, 1).

        Returns:
            s with P(certified | s, n_tokens) = probability; a number too large for any adapter
            (up to e^300) where a length far from the grid asks for more.

        Raises:
            LawError: not fitted.
        """
        self._check_fitted()
        return self._posterior.size_quantile(float(np.log(n_tokens)), probability)


def reached(cells: Sequence[CellRow], recall: float = 1.0, measure: Measure = "records") -> Array:
    """Which cells reach a recall.

    Args:
        cells: finished cells of one setting.
        recall: in (0, 1]. At 1: `certified`, every token at the required probability or more,
            teacher-forced. Below 1: at least that share of the records recited word for word, or,
            by `measure`, of the target tokens at the required probability or more.
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
