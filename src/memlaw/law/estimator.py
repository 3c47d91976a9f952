"""What all laws share: their error, a base class in scikit-learn's style, checked arrays."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from memlaw.core.errors import MemlawError

Array = np.ndarray


class LawError(MemlawError):
    """The cells don't allow the fit, or the plan, that was asked for."""


class Estimator:
    """scikit-learn's conventions without scikit-learn: `get_params`, `set_params`, `repr`.

    Constructor arguments are kept unchanged under their own names. What `fit` learns is stored in
    attributes whose names end in an underscore.
    """

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments, by name. `deep` is accepted and has no effect."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {name: getattr(self, name) for name in names}

    def set_params(self, **params: Any) -> Any:
        """Set constructor arguments; returns self.

        Raises:
            LawError: there is no such argument.
        """
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise LawError(
                    f"{type(self).__name__} has no parameter {name!r}; it has {', '.join(known)}."
                )
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in self.get_params().items())
        return f"{type(self).__name__}({inside})"

    def _check_fitted(self) -> None:
        if not hasattr(self, "params_"):
            raise LawError(f"This {type(self).__name__} isn't fitted: call fit first.")


def checked_rows(X: ArrayLike, *columns: str) -> Array:
    """X as a float array [n, len(columns)].

    Args:
        X: a row per cell.
        columns: names of the columns, for the messages.

    Raises:
        LawError: X has another shape, or holds a number that isn't finite and above 0.
    """
    X = np.asarray(X, dtype=float)
    names = ", ".join(columns)
    if X.ndim != 2 or X.shape[1] != len(columns):
        raise LawError(f"X has shape {X.shape}; it must be [n, {len(columns)}]: {names}.")
    bad = np.flatnonzero(~(np.isfinite(X) & (X > 0)).all(axis=1))
    if len(bad):
        raise LawError(
            f"Row {bad[0]} of X is {X[bad[0]].tolist()} ({names}); all must be finite and above 0."
        )
    return X


def checked_pairs(X: ArrayLike) -> Array:
    """X as a float array [n, 2] of sizes and numbers of tokens; see `checked_rows`."""
    return checked_rows(X, "size", "n_tokens")


def r_squared(y: Array, predicted: Array) -> float:
    """R²: 1 − Σ(y − ŷ)² / Σ(y − ȳ)²; nan if all y are the same."""
    spread = float(((y - y.mean()) ** 2).sum())
    return 1 - float(((y - predicted) ** 2).sum()) / spread if spread > 0 else math.nan
