"""The forms of the memory law side by side on the same cells: AICc and held-out errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from memlaw.law.estimator import Array, LawError
from memlaw.law.forms import FORMS
from memlaw.law.memory_law import MemoryLaw, checked_cells
from memlaw.law.rows import CellRow, Covariate, cell_arrays


@dataclass(frozen=True, kw_only=True)
class FormResult:
    """One form in a comparison.

    Attributes:
        form: its name.
        n_parameters: of the law, without the noise's.
        aicc, delta_aicc: Akaike's criterion, and how far it is above the best form's.
        r2: on uncensored cells.
        sigma, tau: standard deviations of a cell's own error, and of the error that cells trained
            on the same data share; nats.
        held_out_length_error: median |predicted − measured| / |measured| on the uncensored cells
            of the largest length, by a fit without any cell of it; None if that fit is impossible
            or no such cell is left to predict.
        held_out_size_error: the same for the largest size.
    """

    form: str
    n_parameters: int
    aicc: float
    delta_aicc: float
    r2: float
    sigma: float
    tau: float
    held_out_length_error: float | None
    held_out_size_error: float | None


def compare(
    X: ArrayLike,
    y: ArrayLike,
    censored: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    forms: Sequence[str] = tuple(FORMS),
) -> list[FormResult]:
    """Fit several forms to the same cells, and let each predict cells that it wasn't fitted to.

    Args:
        X, y, censored, groups: as `MemoryLaw.fit`.
        forms: names in `FORMS`.

    Returns:
        A result per form, best AICc first.

    Raises:
        LawError: as `MemoryLaw.fit`.
    """
    X, y, cut = checked_cells(X, y, censored)
    labels = None if groups is None else np.asarray(groups).astype(str)
    found = []
    for form in forms:
        law = MemoryLaw(form, intervals=False).fit(X, y, cut, labels)
        found.append((form, law))
    lowest = min(law.aicc_ for _, law in found)
    results = [
        FormResult(
            form=form,
            n_parameters=len(law.params_),
            aicc=law.aicc_,
            delta_aicc=law.aicc_ - lowest if math.isfinite(lowest) else 0.0,
            r2=law.r2_,
            sigma=law.sigma_,
            tau=law.tau_,
            held_out_length_error=_held_out_error(form, X, y, cut, labels, column=1),
            held_out_size_error=_held_out_error(form, X, y, cut, labels, column=0),
        )
        for form, law in found
    ]
    return sorted(results, key=lambda result: result.aicc)


def compare_cells(
    cells: Sequence[CellRow], covariate: Covariate = "rank", forms: Sequence[str] = tuple(FORMS)
) -> list[FormResult]:
    """`compare` on cells of a probe.

    Args:
        cells, covariate: as `cell_arrays`.
        forms: names in `FORMS`.

    Returns:
        A result per form, best AICc first.

    Raises:
        LawError: as `cell_arrays` and `MemoryLaw.fit`.
    """
    return compare(*cell_arrays(cells, covariate), forms=forms)


def _held_out_error(
    form: str, X: Array, y: Array, cut: Array, groups: Array | None, column: int
) -> float | None:
    """Leave out the largest value of a column; None if it can't be done."""
    held = X[:, column] == X[:, column].max()
    asked = held & ~cut & (y != 0)
    if not asked.any():
        return None
    labels = None if groups is None else groups[~held]
    try:
        law = MemoryLaw(form, intervals=False).fit(X[~held], y[~held], cut[~held], labels)
    except LawError:
        return None
    return float(np.median(np.abs(law.predict(X[asked]) - y[asked]) / np.abs(y[asked])))
