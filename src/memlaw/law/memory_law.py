"""The Parametric Memory Law: how far the loss falls, from an adapter's size and what it stores.

    ΔL = C · s^α · ℓ^(−β) + b                                             (the paper's form)

s is the adapter's size (rank or trainable parameters), ℓ the number of target tokens, ΔL the fall
of the mean loss in nats a token. Cells whose loss is close to 0 are right-censored: the adapter
could have taken away more, had there been more. Cells on the same data share an error.

Legend: n cells, G groups, K quadrature nodes, P free numbers of the likelihood.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import log_ndtr, stdtrit

from memlaw.core.errors import MemlawError

Array = np.ndarray
Cell = Mapping[str, Any]
Covariate = Literal["rank", "parameters"]
# What cells must share to be points of one law; the last is a hash of all of it.
SETTING_COLUMNS = ("task", "recipe", "placement", "layers", "objective", "steps", "setting")
_SIZE_COLUMN = {"rank": "rank", "parameters": "n_parameters"}
_COLUMNS = ("size", "n_tokens", "base_nll")  # of X
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(15)
_LOG_WEIGHTS = np.log(_WEIGHTS / _WEIGHTS.sum())
_WALL = 1e4  # steepness of the walls around the search range
_PULL = 20.0  # of a profiled parameter towards its goal, in units of the curvature
_FAR = 1e50
_HIGH_CORRELATION = 0.99


class LawError(MemlawError):
    """The cells don't allow the fit, or the plan, that was asked for."""


# -- the forms ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A family of curves for ΔL. q is the power law C · s^α · ℓ^(−β).

    Attributes:
        name: what `MemoryLaw(form=...)` calls it.
        equation: for people.
        parameters: names, in the order of `MemoryLaw.params_`.
        bounded: it never exceeds L0.
    """

    name: str
    equation: str
    parameters: tuple[str, ...]
    bounded: bool
    curve: Callable[[Array, Array, Array], tuple[Array, ...]] = field(repr=False)

    @property
    def free_exponents(self) -> bool:
        """α and β are fitted; else both are 1."""
        return "alpha" in self.parameters

    @property
    def extras(self) -> tuple[str, ...]:
        """The parameters besides C, α and β."""
        return tuple(p for p in self.parameters if p not in ("C", "alpha", "beta"))


# A curve takes (log q [n], L0 [n], extras) and returns ΔL, dΔL/d log q, and dΔL/d each extra.
# Of k, which is positive, the extra is the logarithm.


def _paper(log_q: Array, base: Array, extras: Array) -> tuple[Array, ...]:
    q = np.exp(log_q)
    return q + extras[0], q, np.ones_like(q)


def _power(log_q: Array, base: Array, extras: Array) -> tuple[Array, ...]:
    q = np.exp(log_q)
    return q, q


def _saturating(log_q: Array, base: Array, extras: Array) -> tuple[Array, ...]:
    q = np.exp(log_q)
    left = np.exp(-q / base)
    return base * (1 - left), q * left


def _knee(log_q: Array, base: Array, extras: Array) -> tuple[Array, ...]:
    k, log_base = math.exp(extras[0]), np.log(base)
    log_sum = np.logaddexp(-k * log_q, -k * log_base)
    share = np.exp(-k * log_q - log_sum)  # how much q, rather than L0, rules
    log_curve = -log_sum / k
    curve = np.exp(log_curve)
    slope_k = curve * (share * log_q + (1 - share) * log_base - log_curve)
    return curve, curve * share, slope_k


def _ceiling(log_q: Array, base: Array, extras: Array) -> tuple[Array, ...]:
    b = extras[0]
    room = np.maximum(base - b, 1e-9)
    curve, slope, slope_k = _knee(log_q, room, extras[1:])
    return b + curve, slope, 1 - (curve - slope) / room, slope_k


_POWER_LAW = ("C", "alpha", "beta")
FORMS: dict[str, Form] = {
    f.name: f
    for f in (
        Form("paper", "ΔL = C s^α ℓ^−β + b", (*_POWER_LAW, "b"), False, _paper),
        Form("power", "ΔL = q = C s^α ℓ^−β", _POWER_LAW, False, _power),
        Form("saturating", "ΔL = L0 (1 − exp(−q/L0))", _POWER_LAW, True, _saturating),
        Form("knee", "ΔL = (q^−k + L0^−k)^(−1/k)", (*_POWER_LAW, "k"), True, _knee),
        Form("capacity", "ΔL = ((C s/ℓ)^−k + L0^−k)^(−1/k)", ("C", "k"), True, _knee),
        Form(
            "ceiling",
            "ΔL = b + (q^−k + (L0 − b)^−k)^(−1/k)",
            (*_POWER_LAW, "b", "k"),
            True,
            _ceiling,
        ),
    )
}


# -- the likelihood -------------------------------------------------------------------------------


class _Likelihood:
    """The negative log-likelihood of a form, with its gradient.

        y_i = m_i + σ ω e_g(i) + σ ε_i,   e, ε ~ N(0, 1);   a censored cell says y_i or more

    Its argument, [P]: log q at the centre of the grid, α, β, extras, log σ, ω (if grouped). ω may
    have either sign, so that ω = 0, no shared error, is inside the range.

    Forms with an offset b have a long bent valley: as b → −∞ with α, β → 0 they become a straight
    line in log s and log ℓ. They are searched by what stays put on the way there: with D = q at the
    centre, the level D + b, the slopes αD and βD, and the bend κ = 1/D, which is small there.
    `native` turns those into the numbers above.

    Given the uncensored cells of a group its e is normal; over that, the censored cells' product
    of probabilities is integrated by Gauss-Hermite quadrature. The gradient is Fisher's identity:
    the mean, over e given the data, of the gradient with e known.
    """

    def __init__(self, form: Form, X: Array, y: Array, censored: Array, groups: Array | None):
        self.form, self.y, self.censored = form, y, censored
        log_size, log_tokens, self.base = np.log(X[:, 0]), np.log(X[:, 1]), X[:, 2]
        free = ~censored
        self.centre = np.array([log_size[free].mean(), log_tokens[free].mean()])
        self.design = self.design_at(X)
        self.grouped = groups is not None
        self.group = (
            np.zeros(len(y), dtype=int)
            if groups is None
            else np.unique(groups, return_inverse=True)[1].reshape(-1)
        )
        self.n_groups = int(self.group.max()) + 1
        self.n_free_in_group = self.sum_by_group(free.astype(float))
        self.scale = float(np.abs(y).max())
        self.low, self.high = self._walls()

    def design_at(self, X: Array) -> Array:
        """[n, 3]: 1, log s and −log ℓ from the centre."""
        logs = np.log(X[:, :2]) - self.centre
        return np.column_stack([np.ones(len(X)), logs[:, 0], -logs[:, 1]])

    def sum_by_group(self, values: Array) -> Array:
        """[n] to [G], or [n, K] to [G, K]."""
        if values.ndim == 1:
            return np.bincount(self.group, weights=values, minlength=self.n_groups)
        out = np.zeros((self.n_groups, values.shape[1]))
        np.add.at(out, self.group, values)
        return out

    @property
    def n_law(self) -> int:
        """How many of the numbers are the law's, not the noise's."""
        return len(self.form.parameters)

    @property
    def bent(self) -> bool:
        """Searched by level, slopes and bend."""
        return "b" in self.form.parameters

    def _walls(self) -> tuple[Array, Array]:
        size = self.scale
        if self.bent:
            walls = {
                "C": (-1.5 * size, min(1.5 * size, 0.999 * self.base.min()))
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
        if self.grouped:
            pairs.append((-30.0, 30.0))
        low, high = np.array(pairs).T
        return low, high

    def native(self, at: Array) -> tuple[Array, Array]:
        """Log q at the centre, α, β, extras and noise, [P]; and their derivatives, [P, P]."""
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
        """The inverse of `native`, within the walls."""
        at = theta.copy()
        if self.bent:
            amplitude = math.exp(theta[0])
            at[:4] = (
                theta[3] + amplitude,
                theta[1] * amplitude,
                theta[2] * amplitude,
                1 / amplitude,
            )
        return np.clip(at, self.low, self.high)

    def curve(self, at: Array, X: Array) -> Array:
        """ΔL at X, as the form has it: [n] nats."""
        theta = self.native(at)[0]
        log_q, extras = self._log_q(theta, self.design_at(X))
        return self.form.curve(log_q, X[:, 2], extras)[0]

    def _log_q(self, theta: Array, design: Array) -> tuple[Array, Array]:
        if self.form.free_exponents:
            log_q, extras = design @ theta[:3], theta[3 : self.n_law]
        else:
            log_q, extras = theta[0] + design[:, 1] + design[:, 2], theta[1 : self.n_law]
        return np.clip(log_q, -700, 50), extras  # a line search may look far out

    def __call__(self, at: Array) -> tuple[float, Array]:
        over = np.maximum(at - self.high, 0) - np.maximum(self.low - at, 0)
        step = self.first_steps()
        wall, wall_gradient = _WALL * ((over / step) ** 2).sum(), 2 * _WALL * over / step**2
        theta, slopes = self.native(
            np.clip(at, self.low, self.high)
        )  # the curve itself is never asked beyond the wall
        log_q, extras = self._log_q(theta, self.design)
        mean, slope, *extra_slopes = self.form.curve(log_q, self.base, extras)
        sigma = math.exp(theta[self.n_law])
        omega = float(theta[self.n_law + 1]) if self.grouped else 0.0
        free, cut, group = ~self.censored, self.censored, self.group
        z = (self.y - mean) / sigma  # [n]

        # e given the uncensored cells of its group: normal with these moments.
        shrink = 1 / (1 + self.n_free_in_group * omega**2)  # [G], the variance
        z_sum = self.sum_by_group(np.where(free, z, 0.0))
        e = (omega * z_sum * shrink)[:, None] + np.sqrt(shrink)[:, None] * _NODES  # [G, K]
        z_free = z[free]
        value = 0.5 * (
            len(z_free) * math.log(2 * math.pi * sigma**2)
            - np.log(shrink).sum()
            + (z_free**2).sum()
            - (omega**2 * z_sum**2 * shrink).sum()
        )

        # The censored cells, at the nodes.
        arg = omega * e[group[cut]] - z[cut, None]  # [n censored, K]
        log_p = log_ndtr(arg)
        log_weights = np.tile(_LOG_WEIGHTS, (self.n_groups, 1))
        np.add.at(log_weights, group[cut], log_p)
        top = log_weights.max(axis=1, keepdims=True)
        weights = np.exp(log_weights - top)
        total = weights.sum(axis=1, keepdims=True)
        value -= float((top + np.log(total)).sum())
        weights /= total

        # The gradient with e known, averaged over e.
        pull = np.empty((len(z), len(_NODES)))  # σ · d log p / d mean
        pull[free] = z[free, None] - omega * e[group[free]]
        near = np.maximum(arg, -1e4)  # φ/Φ; further out it is −arg, and log Φ loses its digits
        ratio = np.exp(-0.5 * near**2 - log_ndtr(near)) / math.sqrt(2 * math.pi)
        pull[cut] = ratio + (near - arg)
        mean_pull = (pull * weights[group]).sum(axis=1)
        to_mean = mean_pull / sigma
        steps = to_mean * slope
        parts = [self.design.T @ steps if self.form.free_exponents else [steps.sum()]]
        parts.append([(to_mean * extra).sum() for extra in extra_slopes])
        parts.append([(mean_pull * z).sum() - free.sum()])
        if self.grouped:
            parts.append([float((pull * (e * weights)[group]).sum())])
        gradient = -slopes.T @ np.concatenate([np.asarray(part, dtype=float) for part in parts])
        return value + wall, np.where(over == 0, gradient, 0.0) + wall_gradient

    def starts(self) -> list[Array]:
        """A few places to start from: least squares on logs, for several extras."""
        free = ~self.censored
        y, found = self.y[free], []
        small = 1e-3 * self.scale
        offsets = [0.0]
        if "b" in self.form.parameters:
            offsets = [float(0.7 * y.min()), 0.0, -0.5 * self.scale, -3 * self.scale]
        for b in offsets:
            design = self.design[free]
            log_y = np.log(np.maximum(y - b, small))
            if self.form.free_exponents:
                law = np.linalg.lstsq(design, log_y, rcond=None)[0]
                residual = log_y - design @ law
            else:
                residual = log_y - design[:, 1] - design[:, 2]
                law = np.array([residual.mean()])
                residual = residual - law
            sigma = max(float(np.std(residual) * np.mean(np.abs(y - b))), small)
            ks = [math.log(1.5), math.log(6.0)] if "k" in self.form.parameters else [None]
            for k in ks:
                extras = [b if name == "b" else k for name in self.form.extras]
                for omega in [[0.5], [5.0]] if self.grouped else [[]]:
                    theta = np.array([*law, *extras, math.log(sigma), *omega], dtype=float)
                    found.append(self.searched(theta))
        return found

    def first_steps(self) -> Array:
        """How far each number may go in a first step: [P]."""
        size = self.scale if self.bent else 1.0
        sizes = {"C": 0.1 * size, "alpha": 0.1 * size, "beta": 0.1 * size, "b": 0.1 / size}
        sizes["k"] = 0.3
        steps = [sizes[name] for name in self.form.parameters] + [0.3]
        return np.array(steps + ([0.3] if self.grouped else []))

    def value(self, name: str, at: Array) -> float:
        """A parameter as it is reported."""
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

        1/(c − b) for b, −1/C for C beside a b, the logarithm of C else and of k.
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
        """The reported parameter of a gauge; ±inf where none has it."""
        if name == "b":
            return 2 * self.scale - 1 / gauge if gauge > 0 else -math.inf
        if name == "C" and self.bent:
            return -1 / gauge if gauge < 0 else math.inf
        return math.exp(min(gauge, 700.0)) if name in ("C", "k") else gauge

    def limit(self, name: str, at: Array, side: int) -> float | None:
        """The end of a parameter's range, if `at` is at a wall on the way there; else None.

        That k, a knee's sharpness, is at a wall only counts for k itself. A straight line, κ = 0,
        lies on the way to smaller b, α and β, and to a larger C.
        """
        names = [p for p in self.form.parameters if p != "k" or name == "k"]
        law = [self.form.parameters.index(p) for p in names]
        margin = 0.1 * self.first_steps()[law]
        low, high = at[law] < self.low[law] + margin, at[law] > self.high[law] - margin
        straight = self.bent and bool(low[names.index("b")])
        if straight and name != "k" and (name == "C") != (side > 0):
            return None
        if not (low | high).any():
            return None
        if side < 0 and (name in ("C", "k") or (straight and name in ("alpha", "beta"))):
            return 0.0
        return side * math.inf


@dataclass(frozen=True)
class _Optimum:
    theta: Array
    value: float


def _descend(f: Callable[[Array], tuple[float, Array]], start: Array, steps: Array) -> _Optimum:
    """Minimise f from `start`; the columns of `steps` ([P, d]) are moves of about unit size."""

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
        return _Optimum(start, f(start)[0])
    done = minimize(
        scaled,
        np.zeros(steps.shape[1]),
        jac=True,
        method="BFGS",
        options={"gtol": 1e-4, "maxiter": 200},
    )
    return _Optimum(start + steps @ done.x, float(done.fun))


def _root_of_inverse(hessian: Array, widest: Array) -> Array:
    """S with S Sᵀ ≈ hessian⁻¹; directions without curvature get the scale `widest` [P]."""
    scaled = hessian * np.outer(widest, widest)
    values, vectors = np.linalg.eigh((scaled + scaled.T) / 2)
    return widest[:, None] * vectors / np.sqrt(np.maximum(values, 1.0))


def _hessian(f: Callable[[Array], tuple[float, Array]], theta: Array, steps: Array) -> Array:
    """Second derivatives at theta by central differences of the gradient."""
    rows = []
    for i, step in enumerate(steps):
        move = np.zeros(len(theta))
        move[i] = step
        rows.append((f(theta + move)[1] - f(theta - move)[1]) / (2 * step))
    found = np.array(rows)
    return (found + found.T) / 2


# -- the estimator --------------------------------------------------------------------------------


class Estimator:
    """scikit-learn's manners, without scikit-learn: `get_params`, `set_params`, `repr`."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments, by name. `deep` is accepted and changes nothing."""
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

    def _fitted(self, attribute: str) -> None:
        if not hasattr(self, attribute):
            raise LawError(f"This {type(self).__name__} isn't fitted: call fit first.")


@dataclass(frozen=True, kw_only=True)
class Identifiability:
    """What a grid can't tell, in words, and the figures behind the words.

    Attributes:
        statements: plain sentences; empty if every parameter is pinned down.
        correlations: of the estimates, for each pair of parameters but C (whose correlation with
            the exponents depends on the units of s and ℓ).
        condition_number: of the estimates' correlation matrix, without C; 1 is ideal.
        unbounded: parameters whose interval has an end the likelihood doesn't bound.
    """

    statements: tuple[str, ...]
    correlations: dict[tuple[str, str], float]
    condition_number: float
    unbounded: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """There is nothing to warn of."""
        return not self.statements


class MemoryLaw(Estimator):
    """The Parametric Memory Law, fitted by maximum likelihood.

    ΔL_i = m(s_i, ℓ_i, L0_i) + u_g(i) + ε_i,  u ~ N(0, τ²),  ε ~ N(0, σ²), where g is the data that
    a cell was trained on; a censored cell has ΔL_i ≥ y_i. Intervals are profile-likelihood with a
    small-sample cutoff: n_e · ln(1 + t²/(n_e − p)), where t is Student's quantile at n_e − p
    degrees of freedom, p the law's parameters, and n_e the effective number of uncensored cells,
    n / (1 + (n/G − 1) · ρ), ρ = τ²/(τ² + σ²) (Kish's design effect).

    Args:
        form: a name in `FORMS`.
        covariate: what `fit_cells` takes for the size s: rank, or trainable parameters.
        confidence: of the intervals, in (0, 1).
        intervals: False leaves intervals and identifiability out; the fit is then quicker.

    Attributes:
        params_: the law's parameters by name. C in nats; `capacity` with covariate `parameters`:
            nats a parameter.
        intervals_: (low, high) by name; ±inf (0 or inf for C and k) where nothing bounds it.
        sigma_: standard deviation of ε, nats; its maximum-likelihood value times √(n/(n − p)).
        tau_: standard deviation of u, nats; 0 without groups. Same correction.
        r2_: R² of the curve on uncensored cells.
        aicc_: Akaike's criterion, small-sample; compare it between forms on the same cells only.
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

    def fit_cells(self, cells: Sequence[Cell]) -> MemoryLaw:
        """Fit to cells of a probe; see `cell_arrays`.

        Args:
            cells: flat dicts, all of one task and setting.

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
            X: [n, 3] float > 0: size (rank or parameters), n_tokens, base_nll (L0, nats a token).
            y: [n] float: delta_nll, nats a token.
            censored: [n] bool: the cell is saturated, its y a lower bound. None: none is.
            groups: [n] labels: cells with the same label share their data, so their error. None:
                errors are independent.

        Returns:
            self.

        Raises:
            LawError: arrays that don't fit together or aren't finite; fewer uncensored cells than
                the form needs; only one size, or one length.
        """
        form = self._form()
        if not 0 < self.confidence < 1:
            raise LawError(f"confidence is {self.confidence:g}; it must lie between 0 and 1.")
        X, y, cut = _checked(X, y, censored)
        labels = None if groups is None else np.asarray(groups).astype(str)
        if labels is not None and labels.shape != y.shape:
            raise LawError(f"groups has shape {labels.shape}; it must be {y.shape}, as y.")
        if labels is not None and len(set(labels)) == len(labels):
            labels = None  # a shared error that nobody shares can't be told from σ
        self._check_enough(form, X, cut)
        likelihood = _Likelihood(form, X, y, cut, labels)
        best, root = _maximise(likelihood)
        if self.intervals:
            best, root = self._profile(likelihood, best, root)
        self._set_results(likelihood, best, X, y, cut)
        if self.intervals:
            self._set_identifiability(likelihood, root)
        return self

    def predict(self, X: ArrayLike) -> Array:
        """Expected ΔL, never above L0: [n] nats a token.

        Args:
            X: [n, 3] float > 0, as in `fit`.

        Raises:
            LawError: not fitted, or X isn't as it should be.
        """
        return np.minimum(self.curve(X), checked_rows(X, *_COLUMNS)[:, 2])

    def curve(self, X: ArrayLike) -> Array:
        """ΔL as the form has it: [n] nats. The forms `paper` and `power` may exceed L0.

        Args:
            X: [n, 3] float > 0, as in `fit`.

        Raises:
            LawError: not fitted, or X isn't as it should be.
        """
        self._fitted("params_")
        return self._likelihood.curve(self._theta, checked_rows(X, *_COLUMNS))

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """R² of `predict`: 1 − Σ(y − ŷ)² / Σ(y − ȳ)².

        Args:
            X: [n, 3] float > 0, as in `fit`.
            y: [n] float, nats; leave saturated cells out.
        """
        return _r2(np.asarray(y, dtype=float), self.predict(X))

    def _form(self) -> Form:
        if self.form not in FORMS:
            raise LawError(f"There is no form {self.form!r}; there are {', '.join(FORMS)}.")
        return FORMS[self.form]

    def _check_enough(self, form: Form, X: Array, cut: Array) -> None:
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

    def _set_results(
        self, likelihood: _Likelihood, best: _Optimum, X: Array, y: Array, cut: Array
    ) -> None:
        form, free = likelihood.form, ~cut
        self._likelihood, self._theta = likelihood, best.theta
        self.params_ = {name: likelihood.value(name, best.theta) for name in form.parameters}
        n, n_free, p = len(y), int(free.sum()), len(form.parameters)
        unbias = math.sqrt(n_free / (n_free - p))
        sigma = math.exp(best.theta[likelihood.n_law])
        omega = abs(float(best.theta[-1])) if likelihood.grouped else 0.0
        self.sigma_, self.tau_ = sigma * unbias, sigma * omega * unbias
        self.r2_ = _r2(y[free], likelihood.curve(best.theta, X[free]))
        self.log_likelihood_ = -best.value
        q = len(best.theta)
        correction = 2 * q * (q + 1) / (n - q - 1) if n > q + 1 else math.inf
        self.aicc_ = 2 * best.value + 2 * q + correction
        self.n_cells_, self.n_censored_ = n, int(cut.sum())
        self.n_groups_ = likelihood.n_groups if likelihood.grouped else n
        self.n_effective_ = _n_effective(likelihood, best.theta)

    # -- intervals

    def _profile(
        self, likelihood: _Likelihood, best: _Optimum, root: Array
    ) -> tuple[_Optimum, Array]:
        """Set `intervals_`. A profile that finds a better maximum starts all over from there."""
        better: _Optimum | None = best
        for _ in range(5):
            cutoff = self._cutoff(likelihood, best.theta)
            ends: dict[str, list[float]] = {}
            self._open: set[str] = set()
            for name in likelihood.form.parameters:
                for side in (-1, 1):
                    end, is_open, better = _interval_end(likelihood, best, root, name, side, cutoff)
                    if better is not None:
                        break
                    ends.setdefault(name, []).append(end)
                    if is_open:
                        self._open.add(name)
                if better is not None:
                    break
            if better is None:
                break
            best, root = _polish(likelihood, better.theta, root)
        else:
            raise LawError(
                f"The fit of {self.form!r} doesn't settle: its likelihood has many maxima on these "
                "cells. Take a form with fewer parameters, or probe more cells."
            )
        estimates = {name: likelihood.value(name, best.theta) for name in ends}
        self.intervals_ = {  # at a wall an end may come out a rounding on the wrong side
            name: (min(low, estimates[name]), max(high, estimates[name]))
            for name, (low, high) in ends.items()
        }
        return best, root

    def _cutoff(self, likelihood: _Likelihood, theta: Array) -> float:
        n = _n_effective(likelihood, theta)
        df = max(n - likelihood.n_law, 1.0)
        t = float(stdtrit(df, 0.5 + self.confidence / 2))
        return n * math.log1p(t**2 / df)

    def _set_identifiability(self, likelihood: _Likelihood, root: Array) -> None:
        names = [name for name in likelihood.form.parameters if name != "C"]
        theta = self._theta
        rows = np.array([likelihood.gauge(name, theta)[1] for name in names]) @ root
        covariance = rows @ rows.T
        deviation = np.sqrt(np.diag(covariance))
        correlation = covariance / np.outer(deviation, deviation)
        correlations = {
            (a, b): float(correlation[i, j])
            for i, a in enumerate(names)
            for j, b in enumerate(names)
            if i < j
        }
        unbounded = tuple(name for name in likelihood.form.parameters if name in self._open)
        self.identifiability_ = Identifiability(
            statements=tuple(self._statements(names, correlations, unbounded)),
            correlations=correlations,
            condition_number=float(np.linalg.cond(correlation)),
            unbounded=unbounded,
        )

    def _statements(
        self,
        names: list[str],
        correlations: dict[tuple[str, str], float],
        unbounded: tuple[str, ...],
    ) -> list[str]:
        found: list[str] = []
        said: set[str] = set()
        if "b" in unbounded and self.intervals_["b"][0] == -math.inf:
            said = {"C", "alpha", "beta", "b"}
            found.append(
                "This grid can't tell alpha and beta from b: ΔL is about as well described by a "
                "straight line in log s and log ℓ, which is where the form goes as b goes to −∞ "
                f"with α and β to 0. {self.confidence:.0%} intervals: alpha "
                f"{self._interval_text('alpha')}, beta {self._interval_text('beta')}, b "
                f"{self._interval_text('b')}. More lengths, further apart, would tell."
            )
        correlated: set[str] = set()
        for (a, b), value in correlations.items():
            loose = [name for name in (a, b) if name in unbounded or self._is_wide(name)]
            if abs(value) > _HIGH_CORRELATION and loose and "b" not in said:
                correlated |= {a, b}
                found.append(
                    f"This grid can't tell {a} from {b}: the correlation of their estimates is "
                    f"{value:+.3f}, and the interval of {' and '.join(loose)} is "
                    f"{' and '.join(self._interval_text(name) for name in loose)}."
                )
        for name in unbounded:
            if name not in said | correlated:
                found.append(
                    f"This grid doesn't bound {name}: its {self.confidence:.0%} interval is "
                    f"{self._interval_text(name)}."
                )
        return found

    def _is_wide(self, name: str) -> bool:
        low, high = self.intervals_[name]
        return high - low > abs(self.params_[name])

    def _interval_text(self, name: str) -> str:
        low, high = self.intervals_[name]
        return f"{low:.3g} to {high:.3g}"


def _n_effective(likelihood: _Likelihood, theta: Array) -> float:
    n = float((~likelihood.censored).sum())
    if not likelihood.grouped:
        return n
    rho = theta[-1] ** 2 / (1 + theta[-1] ** 2)
    n_groups = float((likelihood.n_free_in_group > 0).sum())
    return n / (1 + (n / n_groups - 1) * rho)


def _maximise(likelihood: _Likelihood) -> tuple[_Optimum, Array]:
    steps = np.diag(likelihood.first_steps())
    found = [_descend(likelihood, start, steps) for start in likelihood.starts()]
    best = min(found, key=lambda optimum: optimum.value)
    return _polish(likelihood, best.theta, steps)


def _polish(likelihood: _Likelihood, theta: Array, steps: Array) -> tuple[_Optimum, Array]:
    """The minimum near theta, and a root of the inverse curvature there."""
    widest = np.minimum(likelihood.high - likelihood.low, 100 * likelihood.first_steps())
    small = 1e-4 * likelihood.first_steps()
    for _ in range(2):
        best = _descend(likelihood, theta, steps)
        theta = best.theta
        inside = np.clip(theta, likelihood.low + 2 * small, likelihood.high - 2 * small)
        steps = _root_of_inverse(_hessian(likelihood, inside, small), widest)
    inside = np.clip(theta, likelihood.low, likelihood.high)
    return _Optimum(inside, likelihood(inside)[0]), steps


def _interval_end(
    likelihood: _Likelihood, best: _Optimum, root: Array, name: str, side: int, cutoff: float
) -> tuple[float, bool, _Optimum | None]:
    """Where the profile deviance of a parameter passes `cutoff`.

    The likelihood is minimised together with a spring that pulls the parameter's gauge g towards a
    goal. Wherever g comes to rest, the rest is optimal given g: a point of the profile.

    Returns:
        The end; whether it is open, because a wall of the search range was met first; and, if the
        profile came across a better maximum than `best`, that instead.
    """
    middle, slope = likelihood.gauge(name, best.theta)
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
            gauge, gauge_slope = likelihood.gauge(
                name, np.clip(at, likelihood.low, likelihood.high)
            )
            gap = (gauge - middle) / deviation - pulled
            return value + _PULL / 2 * gap**2, gradient + _PULL * gap * gauge_slope / deviation

        at = _descend(sprung, best.theta + goal * ahead + drift, steps).theta
        at = np.clip(at, likelihood.low, likelihood.high)
        value = likelihood(at)[0]
        if value < best.value - 5e-4:
            return math.nan, False, _Optimum(at, value)
        z = math.sqrt(max(2 * (value - best.value), 0.0))
        if abs(z - target) < 5e-3 * target:
            break
        drift = at - best.theta - goal * ahead
        if z < target:
            if (limit := likelihood.limit(name, at, side)) is not None:
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
    if (limit := likelihood.limit(name, at, side)) is not None:
        return limit, True, None
    return likelihood.from_gauge(name, likelihood.gauge(name, at)[0]), False, None


def _r2(y: Array, predicted: Array) -> float:
    spread = float(((y - y.mean()) ** 2).sum())
    return 1 - float(((y - predicted) ** 2).sum()) / spread if spread > 0 else math.nan


def checked_rows(X: ArrayLike, *columns: str) -> Array:
    """X as floats [n, columns].

    Raises:
        LawError: another shape, or a number that isn't finite and above 0.
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


def _checked(X: ArrayLike, y: ArrayLike, censored: ArrayLike | None) -> tuple[Array, Array, Array]:
    X, y = checked_rows(X, *_COLUMNS), np.asarray(y, dtype=float)
    cut = np.zeros(len(X), dtype=bool) if censored is None else np.asarray(censored, dtype=bool)
    for values, name in ((y, "y"), (cut, "censored")):
        if values.shape != (len(X),):
            raise LawError(
                f"{name} has shape {values.shape}; it must be ({len(X)},), a value a row."
            )
    if not np.isfinite(y).all():
        row = int(np.flatnonzero(~np.isfinite(y))[0])
        raise LawError(f"y is {y[row]} in row {row}; leave out cells that weren't measured.")
    return X, y, cut


# -- cells ----------------------------------------------------------------------------------------


def choose_cells(cells: Sequence[Cell], where: Mapping[str, Any] | None = None) -> list[Cell]:
    """The finished cells with these values, which must all be of one setting.

    Args:
        cells: flat dicts; those whose `status` isn't "success" are left out.
        where: column to value, as {"task": "phonebook"}; None: no choice.

    Returns:
        The cells, in their order.

    Raises:
        LawError: none is left, or they mix several tasks, models, placements, layers, objectives
            or recipes.
    """
    finished = [cell for cell in cells if cell.get("status", "success") == "success"]
    chosen = finished
    for column, wanted in (where or {}).items():
        kept = [cell for cell in chosen if cell.get(column) == wanted]
        if chosen and not kept:
            raise LawError(f"No cell has {column} {wanted!r}; there are {_listed(chosen, column)}.")
        chosen = kept
    if not chosen:
        raise LawError(f"There is no finished cell among {len(cells)}. Run the probe first.")
    for column in SETTING_COLUMNS:
        if len({_key(cell.get(column)) for cell in chosen}) > 1:
            raise LawError(
                f"The cells mix several values of {column}: {_listed(chosen, column)}. Choose "
                f"one: --where {column}=..., or where={{{column!r}: ...}} in Python."
            )
    return chosen


def cell_arrays(
    cells: Sequence[Cell], covariate: Covariate = "rank"
) -> tuple[Array, Array, Array, Array]:
    """Cells as the arrays that `MemoryLaw.fit` takes.

    Args:
        cells: flat dicts with rank or n_parameters, n_tokens, base_nll, delta_nll, saturated,
            task and seed; all of one setting (see `choose_cells`).
        covariate: what the size is.

    Returns:
        X [n, 3], y [n] nats, censored [n] bool, groups [n] str: task, n_tokens and seed, which
        is to say the data.

    Raises:
        LawError: as `choose_cells`; a column is missing; an unknown covariate.
    """
    if covariate not in _SIZE_COLUMN:
        raise LawError(f"covariate is {covariate!r}; it must be one of {', '.join(_SIZE_COLUMN)}.")
    chosen = choose_cells(cells)
    columns = (_SIZE_COLUMN[covariate], "n_tokens", "base_nll")
    X = np.array([[number(cell, name) for name in columns] for cell in chosen])
    y = np.array([number(cell, "delta_nll") for cell in chosen])
    censored = np.array([bool(number(cell, "saturated")) for cell in chosen])
    return X, y, censored, np.array([data_key(cell) for cell in chosen])


def data_key(cell: Cell) -> str:
    """A label of the data that a cell was trained on."""
    known = cell.get("data_sha256")
    return str(known or f"{cell.get('task')}|{cell.get('n_tokens')}|{cell.get('seed')}")


def number(cell: Cell, column: str) -> float:
    """A column of a cell as a float.

    Raises:
        LawError: the cell has none there, or something else than a finite number.
    """
    value: Any = cell.get(column)
    try:
        if not isinstance(value, str) and math.isfinite(found := float(value)):
            return found
    except (TypeError, OverflowError):  # None, a list, a whole number of 400 digits
        pass
    where = ", ".join(f"{k} {cell.get(k)}" for k in ("task", "rank", "n_tokens", "seed"))
    has = f"no {column}" if value is None else f"{column} {value!r}, which is no number"
    raise LawError(f"The cell ({where}) has {has}: it isn't a finished probe cell.")


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _listed(cells: Sequence[Cell], column: str) -> str:
    return ", ".join(sorted({_key(cell.get(column)) for cell in cells}))


# -- comparing forms ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FormResult:
    """One form in a comparison.

    Attributes:
        form: its name.
        n_parameters: of the law, without the noise's.
        aicc, delta_aicc: Akaike's criterion, and how far it is above the best form's.
        r2: on uncensored cells.
        sigma, tau: noise of a cell, and of the data shared by cells, nats.
        held_out_length_error: median |predicted − measured| / |measured| on the uncensored cells
            of the largest length, by a fit without any cell of it; None if that can't be fitted or
            nothing is left to predict.
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
    """Fit several forms to the same cells, and let each predict what it hasn't seen.

    Args:
        X, y, censored, groups: as `MemoryLaw.fit`.
        forms: names in `FORMS`.

    Returns:
        A result a form, best AICc first.

    Raises:
        LawError: as `MemoryLaw.fit`.
    """
    X, y, cut = _checked(X, y, censored)
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
    cells: Sequence[Cell], covariate: Covariate = "rank", forms: Sequence[str] = tuple(FORMS)
) -> list[FormResult]:
    """`compare` on cells of a probe.

    Args:
        cells, covariate: as `cell_arrays`.
        forms: names in `FORMS`.
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
