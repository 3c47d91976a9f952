"""The forms of the memory law: how far the mean loss falls, as a function of size and length.

    ΔL = C · s^α · ℓ^(−β) + b                                             (the paper's form)

s is the adapter's size (rank or trainable parameters), ℓ the number of target tokens, L0 the mean
loss before training and ΔL its fall, both in nats per token. A new form is a function below and an
entry in `FORMS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from memlaw.law.estimator import Array


@dataclass(frozen=True)
class Form:
    """A family of curves for ΔL. q is the power law C · s^α · ℓ^(−β).

    Attributes:
        name: what `MemoryLaw(form=...)` calls it.
        equation: a line of text for people.
        parameters: names, in the order of `MemoryLaw.params_`: C; alpha and beta, or neither of
            them (then both are 1); then b and k, if the form has them.
        bounded: ΔL never exceeds L0.
        curve: takes log q [n], L0 [n] (nats per token) and the values of `extras`; returns ΔL [n],
            dΔL/d log q [n], and dΔL/d extra [n] for each extra. k is above 0; its value is passed
            as a logarithm.
    """

    name: str
    equation: str
    parameters: tuple[str, ...]
    bounded: bool
    curve: Callable[[Array, Array, Array], tuple[Array, ...]] = field(repr=False)

    @property
    def free_exponents(self) -> bool:
        """α and β are fitted; if not, both are 1."""
        return "alpha" in self.parameters

    @property
    def extras(self) -> tuple[str, ...]:
        """The parameters besides C, α and β."""
        return tuple(p for p in self.parameters if p not in ("C", "alpha", "beta"))


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
    share = np.exp(-k * log_q - log_sum)  # near 1 where q is the limit, near 0 where L0 is
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
