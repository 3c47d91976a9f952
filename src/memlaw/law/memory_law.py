"""The Parametric Memory Law as an estimator: fit it to cells, read its parameters, predict.

The curves are in `forms`, the noise model in `likelihood`, the intervals in `profile_likelihood`.

Legend: n cells, G groups (cells of one group were trained on the same data).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from memlaw.law.estimator import Array, Estimator, LawError, checked_rows, r_squared
from memlaw.law.forms import FORMS, Form
from memlaw.law.identifiability import Identifiability, identifiability_of
from memlaw.law.likelihood import Likelihood
from memlaw.law.optimum import Optimum, maximise
from memlaw.law.profile_likelihood import profile_intervals
from memlaw.law.rows import CellRow, Covariate, cell_arrays

_COLUMNS = ("size", "n_tokens", "base_nll")  # of X


class MemoryLaw(Estimator):
    """The Parametric Memory Law, fitted by maximum likelihood.

    ΔL_i = m(s_i, ℓ_i, L0_i) + u_g(i) + ε_i,  u ~ N(0, τ²),  ε ~ N(0, σ²), where g is the data that
    a cell was trained on; a censored cell has ΔL_i ≥ y_i. Intervals are profile-likelihood with a
    small-sample cutoff: n_e · ln(1 + t²/(n_e − p)), where t is Student's quantile at n_e − p
    degrees of freedom, p the number of the law's parameters, and n_e the effective number of
    uncensored cells, n / (1 + (n/G − 1) · ρ), ρ = τ²/(τ² + σ²) (Kish's design effect).

    Args:
        form: a name in `FORMS`.
        covariate: what `fit_cells` takes for the size s: rank, or trainable parameters.
        confidence: of the intervals, in (0, 1).
        intervals: False leaves out intervals and identifiability, which makes the fit quicker.

    Attributes:
        params_: the law's parameters by name. C is in nats; for `capacity` with covariate
            `parameters`, in nats per parameter.
        intervals_: (low, high) by name; ±inf (0 or inf for C and k) where nothing bounds it.
        sigma_: standard deviation of ε, nats: its maximum-likelihood value times √(n/(n − p)).
        tau_: standard deviation of u, nats, with the same correction; 0 without groups.
        r2_: R² of the curve on uncensored cells.
        aicc_: Akaike's criterion, corrected for small samples; compare it between forms on the
            same cells only.
        log_likelihood_: at the maximum.
        n_cells_, n_censored_, n_groups_, n_effective_: how much data.
        identifiability_: what the grid can't tell.

    Source: form `paper` is the paper's law; the other forms, noise model and intervals are ours.

    >>> import numpy as np
    >>> X = np.array([[r, n, 10.0] for r in (1, 2, 4) for n in (64, 128, 256)])
    >>> wobble = 1 + 0.01 * np.sin(np.arange(9) ** 2)
    >>> law = MemoryLaw("power").fit(X, 40 * X[:, 0] ** 0.5 * X[:, 1] ** -0.6 * wobble)
    >>> round(law.params_["beta"], 1)
    0.6
    """

    params_: dict[str, float]
    intervals_: dict[str, tuple[float, float]]
    sigma_: float
    tau_: float
    r2_: float
    aicc_: float
    log_likelihood_: float
    n_cells_: int
    n_censored_: int
    n_groups_: int
    n_effective_: float
    identifiability_: Identifiability

    def __init__(
        self,
        form: str = "paper",
        covariate: Covariate = "rank",
        confidence: float = 0.95,
        intervals: bool = True,
    ) -> None:
        self.form = form
        self.covariate = covariate
        self.confidence = confidence
        self.intervals = intervals

    def fit_cells(self, cells: Sequence[CellRow]) -> MemoryLaw:
        """Fit to cells of a probe; see `cell_arrays`.

        Args:
            cells: rows, all of one task and setting.

        Returns:
            self.

        Raises:
            LawError: as `cell_arrays` and `fit`.
        """
        X, y, censored, groups = cell_arrays(cells, self.covariate)
        return self.fit(X, y, censored=censored, groups=groups)

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        censored: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> MemoryLaw:
        """Fit to arrays.

        Args:
            X: [n, 3] float > 0: size (rank or parameters), n_tokens, base_nll (L0, nats per token).
            y: [n] float: delta_nll, nats per token.
            censored: [n] bool: the cell is saturated, its y a lower bound. None: none is.
            groups: [n] labels: cells with the same label were trained on the same data, so they
                share an error. None: errors are independent.

        Returns:
            self.

        Raises:
            LawError: arrays that don't fit together or aren't finite; fewer uncensored cells than
                the form needs; only one size, or one length.
        """
        if self.form not in FORMS:
            raise LawError(f"There is no form {self.form!r}; there are {', '.join(FORMS)}.")
        form = FORMS[self.form]
        if not 0 < self.confidence < 1:
            raise LawError(f"confidence is {self.confidence:g}; it must lie between 0 and 1.")
        X, y, cut = checked_cells(X, y, censored)
        labels = None if groups is None else np.asarray(groups).astype(str)
        if labels is not None and labels.shape != y.shape:
            raise LawError(f"groups has shape {labels.shape}; it must be {y.shape}, as y.")
        if labels is not None and len(set(labels)) == len(labels):
            labels = None  # a shared error that nobody shares can't be told from σ
        _check_enough(form, X, cut)
        likelihood = Likelihood(form, X, y, cut, labels)
        best, root = maximise(likelihood)
        if not self.intervals:
            self._set_results(likelihood, best, X, y, cut)
            return self
        profile = profile_intervals(likelihood, best, root, self.confidence)
        self._set_results(likelihood, profile.best, X, y, cut)
        self.intervals_ = profile.intervals
        self.identifiability_ = identifiability_of(
            likelihood, profile, self.params_, self.confidence
        )
        return self

    def _set_results(
        self, likelihood: Likelihood, best: Optimum, X: Array, y: Array, cut: Array
    ) -> None:
        form, free, space = likelihood.form, ~cut, likelihood.space
        self._likelihood, self._theta = likelihood, best.theta
        self.params_ = {name: space.value(name, best.theta) for name in form.parameters}
        n, n_free, p = len(y), int(free.sum()), len(form.parameters)
        unbias = math.sqrt(n_free / (n_free - p))
        sigma = math.exp(best.theta[space.n_law])
        omega = abs(float(best.theta[-1])) if likelihood.grouped else 0.0
        self.sigma_, self.tau_ = sigma * unbias, sigma * omega * unbias
        self.r2_ = r_squared(y[free], likelihood.curve(best.theta, X[free]))
        self.log_likelihood_ = -best.value
        q = len(best.theta)
        correction = 2 * q * (q + 1) / (n - q - 1) if n > q + 1 else math.inf
        self.aicc_ = 2 * best.value + 2 * q + correction
        self.n_cells_, self.n_censored_ = n, int(cut.sum())
        self.n_groups_ = likelihood.n_groups if likelihood.grouped else n
        self.n_effective_ = likelihood.n_effective(best.theta)

    def predict(self, X: ArrayLike) -> Array:
        """Expected ΔL, never above L0: [n] nats per token.

        Args:
            X: [n, 3] float > 0, as in `fit`.

        Raises:
            LawError: not fitted, or X isn't as it should be.
        """
        return np.minimum(self.curve(X), checked_rows(X, *_COLUMNS)[:, 2])

    def curve(self, X: ArrayLike) -> Array:
        """ΔL by the form's equation: [n] nats per token. `paper` and `power` may exceed L0.

        Args:
            X: [n, 3] float > 0, as in `fit`.

        Raises:
            LawError: not fitted, or X isn't as it should be.
        """
        self._check_fitted()
        return self._likelihood.curve(self._theta, checked_rows(X, *_COLUMNS))

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """R² of `predict`: 1 − Σ(y − ŷ)² / Σ(y − ȳ)²; nan if all y are the same.

        Args:
            X: [n, 3] float > 0, as in `fit`.
            y: [n] float, nats per token; leave saturated cells out.
        """
        return r_squared(np.asarray(y, dtype=float), self.predict(X))


def checked_cells(
    X: ArrayLike, y: ArrayLike, censored: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """What `MemoryLaw.fit` takes, as arrays: X [n, 3] float, y [n] float, censored [n] bool.

    Raises:
        LawError: shapes that don't fit together; numbers that aren't finite, or X not above 0.
    """
    X, y = checked_rows(X, *_COLUMNS), np.asarray(y, dtype=float)
    cut = np.zeros(len(X), dtype=bool) if censored is None else np.asarray(censored, dtype=bool)
    for values, name in ((y, "y"), (cut, "censored")):
        if values.shape != (len(X),):
            raise LawError(
                f"{name} has shape {values.shape}; it must be ({len(X)},), one value per row of X."
            )
    if not np.isfinite(y).all():
        row = int(np.flatnonzero(~np.isfinite(y))[0])
        raise LawError(f"y is {y[row]} in row {row}; leave out cells that weren't measured.")
    return X, y, cut


def _check_enough(form: Form, X: Array, cut: Array) -> None:
    free, needed = X[~cut], len(form.parameters) + 2
    if len(free) < needed:
        raise LawError(
            f"The form {form.name!r} needs at least {needed} cells that aren't saturated; "
            f"there are {len(free)} of {len(X)}. Probe longer targets or smaller ranks."
        )
    if form.free_exponents:
        for column, what in enumerate(("size", "n_tokens")):
            if len(np.unique(free[:, column])) < 2:
                raise LawError(
                    f"All cells that aren't saturated have the same {what}, "
                    f"{free[0, column]:g}: its exponent can't be fitted. Probe a second one."
                )
