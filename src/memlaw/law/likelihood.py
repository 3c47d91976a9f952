"""The likelihood of cells under a form of the memory law.

    y_i = m_i + σ ω e_g(i) + σ ε_i,   e, ε ~ N(0, 1)

m is the form's curve. Cells trained on the same data, a group g, share the error e_g. A cell whose
loss is close to 0 is right-censored: the adapter could have reduced the loss further, had there
been more of it, so that its y is a lower bound.

Legend: n cells, G groups, K quadrature nodes, P numbers that are searched (see `search_space`).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import log_ndtr

from memlaw.law.estimator import Array
from memlaw.law.forms import Form
from memlaw.law.search_space import SearchSpace

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(15)
_LOG_WEIGHTS = np.log(_WEIGHTS / _WEIGHTS.sum())
_WALL = 1e4  # steepness of the walls around the search range


class Likelihood:
    """The negative log-likelihood of a form as a function of the searched numbers [P].

    Given the uncensored cells of a group, its e is normal; over that, the product of the censored
    cells' probabilities is integrated by Gauss-Hermite quadrature. The gradient is Fisher's
    identity: the mean, over e given the data, of the gradient with e known.

    Args:
        form: of the law.
        X: [n, 3] float > 0: size, n_tokens, L0 (nats per token).
        y: [n] float: ΔL, nats per token.
        censored: [n] bool.
        groups: [n] labels, or None: errors are independent.

    Attributes:
        space: what is searched over.
        grouped: cells share errors.
        n_groups: G; 1 if not grouped.
    """

    def __init__(
        self, form: Form, X: Array, y: Array, censored: Array, groups: Array | None
    ) -> None:
        self.form, self.y, self.censored = form, y, censored
        log_size, log_tokens, self.base = np.log(X[:, 0]), np.log(X[:, 1]), X[:, 2]
        free = ~censored
        self.centre = np.array([log_size[free].mean(), log_tokens[free].mean()])
        self.design = self._design_at(X)
        self.grouped = groups is not None
        self.group = (
            np.zeros(len(y), dtype=int)
            if groups is None
            else np.unique(groups, return_inverse=True)[1].reshape(-1)
        )
        self.n_groups = int(self.group.max()) + 1
        self.n_free_in_group = self._sum_by_group(free.astype(float))
        self.scale = float(np.abs(y).max())
        self.space = SearchSpace(
            form, self.centre, self.scale, float(self.base.min()), self.grouped
        )

    def _design_at(self, X: Array) -> Array:
        """[n, 3]: 1, log s and −log ℓ, both less their centre."""
        logs = np.log(X[:, :2]) - self.centre
        return np.column_stack([np.ones(len(X)), logs[:, 0], -logs[:, 1]])

    def _sum_by_group(self, values: Array) -> Array:
        """[n] to [G]."""
        return np.bincount(self.group, weights=values, minlength=self.n_groups)

    def curve(self, at: Array, X: Array) -> Array:
        """ΔL at X [n, 3] by the form: [n] nats per token."""
        theta = self.space.native(at)[0]
        log_q, extras = self.space.log_q(theta, self._design_at(X))
        return self.form.curve(log_q, X[:, 2], extras)[0]

    def n_effective(self, at: Array) -> float:
        """The effective number of uncensored cells: n / (1 + (n/G − 1) ρ), ρ = ω²/(1 + ω²)."""
        n = float((~self.censored).sum())
        if not self.grouped:
            return n
        rho = at[-1] ** 2 / (1 + at[-1] ** 2)
        n_groups = float((self.n_free_in_group > 0).sum())
        return n / (1 + (n / n_groups - 1) * rho)

    def __call__(self, at: Array) -> tuple[float, Array]:
        """The negative log-likelihood at a point [P], and its gradient [P].

        Outside the search range a steep wall is added to the value at the nearest point inside.
        """
        space = self.space
        over = np.maximum(at - space.high, 0) - np.maximum(space.low - at, 0)
        step = space.first_steps
        wall, wall_gradient = _WALL * ((over / step) ** 2).sum(), 2 * _WALL * over / step**2
        theta, slopes = space.native(space.inside(at))
        value, native_gradient = self._at_native(theta)
        gradient = -slopes.T @ native_gradient
        return value + wall, np.where(over == 0, gradient, 0.0) + wall_gradient

    def _at_native(self, theta: Array) -> tuple[float, Array]:
        """The negative log-likelihood at native numbers, and the log-likelihood's gradient [P]."""
        log_q, extras = self.space.log_q(theta, self.design)
        mean, slope, *extra_slopes = self.form.curve(log_q, self.base, extras)
        n_law = self.space.n_law
        sigma = math.exp(theta[n_law])
        omega = float(theta[n_law + 1]) if self.grouped else 0.0
        free, cut, group = ~self.censored, self.censored, self.group
        z = (self.y - mean) / sigma  # [n]

        # e given the uncensored cells of its group: normal with these moments.
        shrink = 1 / (1 + self.n_free_in_group * omega**2)  # [G], the variance
        z_sum = self._sum_by_group(np.where(free, z, 0.0))
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
        return value, np.concatenate([np.asarray(part, dtype=float) for part in parts])

    def starts(self) -> list[Array]:
        """A few points [P] to start from: least squares on logarithms, for several extras."""
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
                    found.append(self.space.searched(theta))
        return found
