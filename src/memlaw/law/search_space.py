"""The numbers that the fit of a memory law searches over, and how parameters follow from them.

The likelihood is a function of *native* numbers: log q at the centre of the grid, α, β, extras,
log σ, and ω = τ/σ if cells share errors. ω may have either sign, so that ω = 0, no shared error, is
inside the range.

Forms with an offset b have a long bent valley: as b → −∞ with α, β → 0 they become a straight line
in log s and log ℓ. They are searched by numbers that stay finite on the way there: with D = q at
the centre, the level D + b, the slopes αD and βD, and the bend κ = 1/D, which is small there. Other
forms are searched by the native numbers.

Legend: P numbers that are searched.
"""

from __future__ import annotations

import math

import numpy as np

from memlaw.law.estimator import Array
from memlaw.law.forms import Form


class SearchSpace:
    """Ranges, step sizes and conversions of the numbers [P] that are searched over.

    Args:
        form: of the law.
        centre: [2]: means of log s and log ℓ over the uncensored cells.
        scale: the largest |ΔL|, nats per token.
        lowest_base: the smallest L0, nats per token.
        grouped: cells share errors, so ω is among the numbers.

    Attributes:
        n_law: how many of the numbers are the law's, not the noise's.
        low, high: [P]: the walls of the search range.
        first_steps: [P]: how far each number may go in a first step.
    """

    def __init__(
        self, form: Form, centre: Array, scale: float, lowest_base: float, grouped: bool
    ) -> None:
        self.form, self.centre, self.scale = form, centre, scale
        self.n_law = len(form.parameters)
        self.bent = "b" in form.parameters  # searched by level, slopes and bend
        self.low, self.high = self._walls(lowest_base, grouped)
        self.first_steps = self._first_steps(grouped)

    def _walls(self, lowest_base: float, grouped: bool) -> tuple[Array, Array]:
        size = self.scale
        if self.bent:
            walls = {
                "C": (-1.5 * size, min(1.5 * size, 0.999 * lowest_base))
                if self.form.bounded
                else (-1.5 * size, 1.5 * size),
                "alpha": (-20 * size, 20 * size),
                "beta": (-20 * size, 20 * size),
                "b": (0.01 / size, 1000 / size),
            }
        else:
            walls = {
                "C": (math.log(1e-6 * size), math.log(1e3 * size)),
                "alpha": (-2.0, 10.0),
                "beta": (-2.0, 10.0),
            }
        walls["k"] = (math.log(0.2), math.log(50.0))
        pairs = [walls[name] for name in self.form.parameters]
        pairs.append((math.log(1e-6 * size), math.log(10 * size)))
        if grouped:
            pairs.append((-30.0, 30.0))
        low, high = np.array(pairs).T
        return low, high

    def _first_steps(self, grouped: bool) -> Array:
        size = self.scale if self.bent else 1.0
        sizes = {"C": 0.1 * size, "alpha": 0.1 * size, "beta": 0.1 * size, "b": 0.1 / size}
        sizes["k"] = 0.3
        steps = [sizes[name] for name in self.form.parameters] + [0.3]
        return np.array(steps + ([0.3] if grouped else []))

    def inside(self, at: Array) -> Array:
        """The nearest point within the walls: [P]."""
        return np.clip(at, self.low, self.high)

    def native(self, at: Array) -> tuple[Array, Array]:
        """The native numbers [P] of a point [P], and their derivatives by it [P, P]."""
        theta, slopes = at.copy(), np.eye(len(at))
        if self.bent:
            level, rise, fall, bend = at[:4]
            theta[:4] = -math.log(bend), rise * bend, fall * bend, level - 1 / bend
            slopes[:4, :4] = [
                [0, 0, 0, -1 / bend],
                [0, bend, 0, rise],
                [0, 0, bend, fall],
                [1, 0, 0, 1 / bend**2],
            ]
        return theta, slopes

    def searched(self, theta: Array) -> Array:
        """The inverse of `native`, moved to within the walls: [P]."""
        at = theta.copy()
        if self.bent:
            amplitude = math.exp(theta[0])
            at[:4] = (
                theta[3] + amplitude,
                theta[1] * amplitude,
                theta[2] * amplitude,
                1 / amplitude,
            )
        return self.inside(at)

    def log_q(self, theta: Array, design: Array) -> tuple[Array, Array]:
        """log q [n], and the form's extras, at native numbers [P].

        Args:
            theta: native numbers.
            design: [n, 3]: 1, log s and −log ℓ, both less their centre.
        """
        if self.form.free_exponents:
            log_q, extras = design @ theta[:3], theta[3 : self.n_law]
        else:
            log_q, extras = theta[0] + design[:, 1] + design[:, 2], theta[1 : self.n_law]
        return np.clip(log_q, -700, 50), extras  # a line search may look far out

    def value(self, name: str, at: Array) -> float:
        """A parameter of the law, as it is reported."""
        theta, _ = self.native(at)
        found = float(theta[self.form.parameters.index(name)])
        if name == "C":
            found = self._log_c(theta)
        return math.exp(min(found, 700.0)) if name in ("C", "k") else found

    def _log_c(self, theta: Array) -> float:
        if self.form.free_exponents:
            return float(theta[0] - theta[1] * self.centre[0] + theta[2] * self.centre[1])
        return float(theta[0] - self.centre[0] + self.centre[1])

    def gauge(self, name: str, at: Array) -> tuple[float, Array]:
        """An increasing function of a parameter that is smooth at κ = 0, and its gradient [P].

        For b it is 1/(c − b), c a constant; for C beside a b −1/C; for any other C, and for k, the
        logarithm; for α and β themselves.
        """
        theta, slopes = self.native(at)
        i = self.form.parameters.index(name)
        by_theta = np.zeros(len(at))
        by_theta[i] = 1.0
        found = float(theta[i])
        if name == "C":
            if self.form.free_exponents:
                by_theta[1], by_theta[2] = -self.centre[0], self.centre[1]
            found = self._log_c(theta)
            if self.bent:
                found = -math.exp(min(-found, 100.0))
                by_theta *= -found
        if name == "b":
            found = 1 / (2 * self.scale - found)
            by_theta *= found**2
        return found, slopes.T @ by_theta

    def from_gauge(self, name: str, gauge: float) -> float:
        """The reported parameter that has this gauge; ±inf where none has."""
        if name == "b":
            return 2 * self.scale - 1 / gauge if gauge > 0 else -math.inf
        if name == "C" and self.bent:
            return -1 / gauge if gauge < 0 else math.inf
        return math.exp(min(gauge, 700.0)) if name in ("C", "k") else gauge

    def limit(self, name: str, at: Array, side: int) -> float | None:
        """The end of a parameter's range, if `at` is at a wall on the way there; None if it isn't.

        That k, the sharpness of a knee, is at a wall only counts for k itself. A straight line,
        κ = 0, lies on the way to smaller b, α and β, and to a larger C.

        Args:
            name: of the parameter.
            at: [P].
            side: −1 for the lower end, 1 for the upper.
        """
        names = [p for p in self.form.parameters if p != "k" or name == "k"]
        law = [self.form.parameters.index(p) for p in names]
        margin = 0.1 * self.first_steps[law]
        low, high = at[law] < self.low[law] + margin, at[law] > self.high[law] - margin
        straight = self.bent and bool(low[names.index("b")])
        if straight and name != "k" and (name == "C") != (side > 0):
            return None
        if not (low | high).any():
            return None
        if side < 0 and (name in ("C", "k") or (straight and name in ("alpha", "beta"))):
            return 0.0
        return side * math.inf
