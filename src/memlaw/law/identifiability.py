"""Which parameters of a memory law a grid of cells determines, and which it doesn't."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from memlaw.law.likelihood import Likelihood
from memlaw.law.profile_likelihood import Profile

_HIGH_CORRELATION = 0.99


@dataclass(frozen=True, kw_only=True)
class Identifiability:
    """What a grid can't tell, in words, and the numbers behind the words.

    Attributes:
        statements: plain sentences; empty if the grid determines every parameter.
        correlations: of the estimates, in [−1, 1], for each pair of parameters but C (whose
            correlation with the exponents depends on the units of s and ℓ).
        condition_number: of the estimates' correlation matrix, without C; 1 is ideal.
        unbounded: parameters whose interval has an end that the likelihood doesn't bound.
    """

    statements: tuple[str, ...]
    correlations: dict[tuple[str, str], float]
    condition_number: float
    unbounded: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """There is nothing to warn of."""
        return not self.statements


def identifiability_of(
    likelihood: Likelihood, profile: Profile, params: Mapping[str, float], confidence: float
) -> Identifiability:
    """What the cells of a likelihood can't tell.

    Args:
        likelihood: of the cells.
        profile: its maximum and intervals.
        params: the estimates, by name.
        confidence: of the intervals, for the sentences.
    """
    names = [name for name in likelihood.form.parameters if name != "C"]
    theta = profile.best.theta
    rows = np.array([likelihood.space.gauge(name, theta)[1] for name in names]) @ profile.root
    covariance = rows @ rows.T
    deviation = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(deviation, deviation)
    correlations = {
        (a, b): float(correlation[i, j])
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i < j
    }
    return Identifiability(
        statements=tuple(_statements(profile, params, correlations, confidence)),
        correlations=correlations,
        condition_number=float(np.linalg.cond(correlation)),
        unbounded=profile.unbounded,
    )


def _statements(
    profile: Profile,
    params: Mapping[str, float],
    correlations: Mapping[tuple[str, str], float],
    confidence: float,
) -> list[str]:
    unbounded, intervals = profile.unbounded, profile.intervals
    text = {name: f"{low:.3g} to {high:.3g}" for name, (low, high) in intervals.items()}
    wide = {name for name, (low, high) in intervals.items() if high - low > abs(params[name])}
    found: list[str] = []
    said: set[str] = set()
    if "b" in unbounded and intervals["b"][0] == -math.inf:
        said = {"C", "alpha", "beta", "b"}
        found.append(
            "This grid can't tell alpha and beta from b: ΔL is about as well described by a "
            "straight line in log s and log ℓ, which is where the form goes as b goes to −∞ "
            f"with α and β to 0. {confidence:.0%} intervals: alpha "
            f"{text['alpha']}, beta {text['beta']}, b "
            f"{text['b']}. More lengths, further apart, would tell."
        )
    correlated: set[str] = set()
    for (a, b), value in correlations.items():
        loose = [name for name in (a, b) if name in unbounded or name in wide]
        if abs(value) > _HIGH_CORRELATION and loose and "b" not in said:
            correlated |= {a, b}
            found.append(
                f"This grid can't tell {a} from {b}: the correlation of their estimates is "
                f"{value:+.3f}, and the interval of {' and '.join(loose)} is "
                f"{' and '.join(text[name] for name in loose)}."
            )
    for name in unbounded:
        if name not in said | correlated:
            found.append(
                f"This grid doesn't bound {name}: its {confidence:.0%} interval is {text[name]}."
            )
    return found
