"""Profile-likelihood intervals of the parameters of a memory law.

A parameter is held at a value, and the others and the noise are fitted anew: the deviance, twice
the loss of log-likelihood, grows with the distance from the best fit. The interval ends where it
reaches a cutoff.

Legend: P numbers that are searched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from memlaw.law.estimator import Array, LawError
from memlaw.law.likelihood import Likelihood
from memlaw.law.optimum import Optimum, descend, polish

_PULL = 20.0  # of a profiled parameter towards its goal, in units of the curvature


@dataclass(frozen=True)
class Profile:
    """The intervals of all parameters, and the maximum that they belong to.

    Attributes:
        best: the maximum.
        root: [P, P]: a root of the inverse curvature there.
        intervals: (low, high) by parameter; ±inf (0 or inf for C and k) where nothing bounds it.
        unbounded: parameters whose interval has an end that the likelihood doesn't bound.
    """

    best: Optimum
    root: Array
    intervals: dict[str, tuple[float, float]]
    unbounded: tuple[str, ...]


def profile_intervals(
    likelihood: Likelihood, best: Optimum, root: Array, confidence: float
) -> Profile:
    """The intervals. A profile that finds a better maximum starts all over from there.

    Args:
        likelihood: of the cells.
        best, root: as `maximise` gives them.
        confidence: in (0, 1).

    Raises:
        LawError: better maxima are found again and again.
    """
    better: Optimum | None = best
    for _ in range(5):
        cutoff = _cutoff(likelihood, best.theta, confidence)
        ends: dict[str, list[float]] = {}
        open_ended: set[str] = set()
        for name in likelihood.form.parameters:
            for side in (-1, 1):
                end, is_open, better = _interval_end(likelihood, best, root, name, side, cutoff)
                if better is not None:
                    break
                ends.setdefault(name, []).append(end)
                if is_open:
                    open_ended.add(name)
            if better is not None:
                break
        if better is None:
            break
        best, root = polish(likelihood, better.theta, root)
    else:
        raise LawError(
            f"The fit of {likelihood.form.name!r} doesn't converge: its likelihood has many maxima "
            "on these cells. Take a form with fewer parameters, or probe more cells."
        )
    estimates = {name: likelihood.space.value(name, best.theta) for name in ends}
    return Profile(
        best=best,
        root=root,
        intervals={  # at a wall an end may come out a rounding on the wrong side
            name: (min(low, estimates[name]), max(high, estimates[name]))
            for name, (low, high) in ends.items()
        },
        unbounded=tuple(name for name in likelihood.form.parameters if name in open_ended),
    )


def _cutoff(likelihood: Likelihood, theta: Array, confidence: float) -> float:
    """Of the deviance: n_e ln(1 + t²/(n_e − p)); see `MemoryLaw`."""
    n = likelihood.n_effective(theta)
    df = max(n - likelihood.space.n_law, 1.0)
    t = float(stdtrit(df, 0.5 + confidence / 2))
    return n * math.log1p(t**2 / df)


def _interval_end(
    likelihood: Likelihood, best: Optimum, root: Array, name: str, side: int, cutoff: float
) -> tuple[float, bool, Optimum | None]:
    """Where the profile deviance of a parameter passes `cutoff`.

    The likelihood is minimised together with a spring that pulls the parameter's gauge g towards a
    goal. Wherever g comes to rest, the rest is optimal given g: a point of the profile.

    Returns:
        The end; whether it is open, because a wall of the search range was met first; and, if the
        profile came across a better maximum than `best`, that instead.
    """
    space = likelihood.space
    middle, slope = space.gauge(name, best.theta)
    gain = root.T @ slope
    deviation = float(np.sqrt(gain @ gain))
    ahead = root @ gain / deviation  # moves g by one deviation, and the others along
    along = gain / deviation
    steps = root @ (np.eye(len(along)) + (1 / math.sqrt(1 + _PULL) - 1) * np.outer(along, along))
    target, goal = math.sqrt(cutoff), side * math.sqrt(cutoff)
    drift = np.zeros(len(best.theta))  # how far the path bends off the straight line
    inner, outer = (0.0, 0.0), (math.inf, math.inf)  # goal and √deviance, either side of the end
    for _ in range(40):
        pulled = goal * (1 + 1 / _PULL)

        def sprung(at: Array, pulled: float = pulled) -> tuple[float, Array]:
            value, gradient = likelihood(at)
            gauge, gauge_slope = space.gauge(name, space.inside(at))
            gap = (gauge - middle) / deviation - pulled
            return value + _PULL / 2 * gap**2, gradient + _PULL * gap * gauge_slope / deviation

        at = space.inside(descend(sprung, best.theta + goal * ahead + drift, steps).theta)
        value = likelihood(at)[0]
        if value < best.value - 5e-4:
            return math.nan, False, Optimum(at, value)
        z = math.sqrt(max(2 * (value - best.value), 0.0))
        if abs(z - target) < 5e-3 * target:
            break
        drift = at - best.theta - goal * ahead
        if z < target:
            if (limit := space.limit(name, at, side)) is not None:
                return limit, True, None
            inner = (goal, z)
        else:
            outer = (goal, z)
        if math.isinf(outer[0]):
            growth = min(max(1.05 * target / max(z, 1e-9), 1.1), 3.0)
            goal *= growth
            drift = drift * growth**2
        else:
            share = (target - inner[1]) / (outer[1] - inner[1])
            goal = inner[0] + min(max(share, 0.1), 0.9) * (outer[0] - inner[0])
    if (limit := space.limit(name, at, side)) is not None:
        return limit, True, None
    return space.from_gauge(name, space.gauge(name, at)[0]), False, None
