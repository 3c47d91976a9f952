"""The share of target tokens below the required probability: by an adapter's size and length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, stdtrit

from memlaw.law.estimator import Array, Estimator, LawError, checked_pairs, r_squared
from memlaw.law.rows import CellRow, Covariate, cell_arrays, choose_cells, number


class ShareLaw(Estimator):
    """The share of target tokens below the required probability, by size and length.

        share = 1 / (1 + exp(−(a − b ln s + c ln ℓ)))

    It is fitted by fractional logit (the Bernoulli likelihood with a share for an outcome). A weak
    normal prior (sd 5 on standardised coefficients) keeps it finite where each share is 0 or 1.
    Intervals are from the sandwich estimator, clustered by data, with its CR1 correction and
    Student's t with G − 1 degrees of freedom (G data sets): nothing is assumed about how the tokens
    of a cell, or the cells on the same data, depend on each other.

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

    def fit_cells(self, cells: Sequence[CellRow]) -> ShareLaw:
        """Fit to cells of a probe.

        Args:
            cells: rows with share_under and what `cell_arrays` needs, all of one task and setting.

        Returns:
            self.

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
            LawError: arrays that don't fit together; shares out of range, or all the same; fewer
                than four groups, or only one size or length.
        """
        X, share = checked_pairs(X), np.asarray(share, dtype=float)
        labels = np.arange(len(X)).astype(str) if groups is None else np.asarray(groups).astype(str)
        for values, name in ((share, "share"), (labels, "groups")):
            if values.shape != (len(X),):
                raise LawError(f"{name} has shape {values.shape}; it must be ({len(X)},).")
        if not ((share >= 0) & (share <= 1)).all():
            raise LawError("Shares must lie between 0 and 1.")
        if len(set(share.tolist())) < 2:
            raise LawError(
                f"All shares are {share[0]:g}: that says nothing about where they change. Probe "
                "other ranks or lengths."
            )
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
        """Expected share of tokens below the required probability: [n] in [0, 1].

        Args:
            X: [n, 2] float > 0: size, n_tokens.

        Raises:
            LawError: not fitted, or X isn't as it should be.
        """
        self._check_fitted()
        logs = np.log(checked_pairs(X))
        a, b, c = (self.params_[name] for name in "abc")
        return expit(a - b * logs[:, 0] + c * logs[:, 1])

    def score(self, X: ArrayLike, share: ArrayLike) -> float:
        """R² of `predict`; nan if all shares are the same."""
        return r_squared(np.asarray(share, dtype=float), self.predict(X))


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
