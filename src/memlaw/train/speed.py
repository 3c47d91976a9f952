"""How fast training ran, against how fast this machine multiplies matrices."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from memlaw.core.observer import EpochStats
from memlaw.model.products import computes_in

_SIZES = (256, 512, 1024, 2048)
_TRIES = 5
_ENOUGH_S = 0.25  # for one product: CPUs without instructions for a dtype may take minutes


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Rates over the epochs of a run.

    Attributes:
        tokens_per_s: tokens that an engine ran, prompts (and the plain engine's pads) included.
        flop_per_s: floating-point operations in matrix products.
        peak_flop_per_s: the best this machine does, on large square matrices of `peak_dtype`.
        peak_dtype: what it multiplies the model's matrices in, such as `bfloat16`.
    """

    tokens_per_s: float
    flop_per_s: float
    peak_flop_per_s: float
    peak_dtype: str

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
    if device.type == "cpu":
        dtype = computes_in(dtype)
    return Speed(
        tokens_per_s=sum(epoch.n_tokens_run for epoch in curve) / wall_s,
        flop_per_s=sum(epoch.flop for epoch in curve) / wall_s,
        peak_flop_per_s=matmul_peak(dtype, device),
        peak_dtype=str(dtype).removeprefix("torch."),
    )


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Measured FLOP/s of the product of two square matrices, the best of a few tries.

    The matrices are as large as can be multiplied in a quarter of a second.
    """
    best = 0.0
    for size in _SIZES:
        a = torch.randn(size, size, device=device).to(dtype)
        for _ in range(_TRIES):
            _wait(device)
            started = time.perf_counter()
            a @ a
            _wait(device)
            took_s = time.perf_counter() - started
            best = max(best, 2 * size**3 / took_s)
            if took_s > _ENOUGH_S:
                return best
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
