"""The maximum of a likelihood: from several starts, then with steps scaled by the curvature.

Legend: P numbers that are searched, d directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from memlaw.law.estimator import Array
from memlaw.law.likelihood import Likelihood

Objective = Callable[[Array], tuple[float, Array]]  # a point [P] to its value and gradient [P]
_FAR = 1e50


@dataclass(frozen=True)
class Optimum:
    """A minimum.

    Attributes:
        theta: [P]: where it is.
        value: of the function there.
    """

    theta: Array
    value: float


def maximise(likelihood: Likelihood) -> tuple[Optimum, Array]:
    """The best fit: the minimum of the negative log-likelihood.

    Returns:
        The minimum, and a root [P, P] of the inverse curvature there: S with S Sᵀ ≈ H⁻¹.
    """
    steps = np.diag(likelihood.space.first_steps)
    found = [descend(likelihood, start, steps) for start in likelihood.starts()]
    best = min(found, key=lambda optimum: optimum.value)
    return polish(likelihood, best.theta, steps)


def polish(likelihood: Likelihood, theta: Array, steps: Array) -> tuple[Optimum, Array]:
    """The minimum near theta [P], and a root [P, P] of the inverse curvature there."""
    space = likelihood.space
    widest = np.minimum(space.high - space.low, 100 * space.first_steps)
    small = 1e-4 * space.first_steps
    for _ in range(2):
        best = descend(likelihood, theta, steps)
        theta = best.theta
        inside = np.clip(theta, space.low + 2 * small, space.high - 2 * small)
        steps = _root_of_inverse(_hessian(likelihood, inside, small), widest)
    inside = space.inside(theta)
    return Optimum(inside, likelihood(inside)[0]), steps


def descend(f: Objective, start: Array, steps: Array) -> Optimum:
    """Minimise f by BFGS.

    Args:
        f: gives its value and its gradient.
        start: [P].
        steps: [P, d]: its columns are moves of about unit size; only these are made.
    """

    def scaled(w: Array) -> tuple[float, Array]:
        at = start + steps @ w
        if np.abs(at).max() < _FAR:
            with np.errstate(over="ignore", invalid="ignore"):
                value, gradient = f(at)
                gradient = steps.T @ gradient
            if abs(value) < _FAR and np.abs(gradient).max() < _FAR:
                return value, gradient
        return _FAR, np.zeros(len(w))  # a line search has looked too far out: no way there

    if steps.shape[1] == 0:
        return Optimum(start, f(start)[0])
    done = minimize(
        scaled,
        np.zeros(steps.shape[1]),
        jac=True,
        method="BFGS",
        options={"gtol": 1e-4, "maxiter": 200},
    )
    return Optimum(start + steps @ done.x, float(done.fun))


def _root_of_inverse(hessian: Array, widest: Array) -> Array:
    """S with S Sᵀ ≈ hessian⁻¹; directions without curvature get the scale `widest` [P]."""
    scaled = hessian * np.outer(widest, widest)
    values, vectors = np.linalg.eigh((scaled + scaled.T) / 2)
    return widest[:, None] * vectors / np.sqrt(np.maximum(values, 1.0))


def _hessian(f: Objective, theta: Array, steps: Array) -> Array:
    """Second derivatives at theta by central differences of the gradient: [P, P]."""
    rows = []
    for i, step in enumerate(steps):
        move = np.zeros(len(theta))
        move[i] = step
        rows.append((f(theta + move)[1] - f(theta - move)[1]) / (2 * step))
    found = np.array(rows)
    return (found + found.T) / 2
