"""How fast training ran, against how fast this machine multiplies matrices."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memlaw.core.observer import EpochStats

_SIZE = 2048
_TRIES = 5


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Rates over the epochs of a run.

    Attributes:
        tokens_per_s: tokens that an engine ran, prompts (and the plain engine's pads) included.
        flop_per_s: floating-point operations in matrix products.
        peak_flop_per_s: the best this machine does, on large square matrices of the same dtype.
    """

    tokens_per_s: float
    flop_per_s: float
    peak_flop_per_s: float

    @property
    def share_of_peak(self) -> float:
        """flop_per_s / peak_flop_per_s."""
        return self.flop_per_s / self.peak_flop_per_s


def measure_speed(
    curve: Sequence[EpochStats], dtype: torch.dtype, device: torch.device
) -> Speed | None:
    """Rates over the epochs of `curve`; None if it is empty."""
    wall_s = sum(epoch.wall_s for epoch in curve)
    if not wall_s:
        return None
    return Speed(
        tokens_per_s=sum(epoch.n_tokens_run for epoch in curve) / wall_s,
        flop_per_s=sum(epoch.flop for epoch in curve) / wall_s,
        peak_flop_per_s=matmul_peak(dtype, device),
    )


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Measured FLOP/s of the product of two square matrices, the best of a few tries."""
    a = torch.randn(_SIZE, _SIZE, device=device).to(dtype)
    best_s = float("inf")
    for _ in range(_TRIES):
        _wait(device)
        started = time.perf_counter()
        a @ a
        _wait(device)
        best_s = min(best_s, time.perf_counter() - started)
    return 2 * _SIZE**3 / best_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
