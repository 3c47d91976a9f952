"""PyTorch's threads: no more of them than there are cores that others leave free.

The threads of an operation wait for each other, spinning. Where one of them shares its core with
another process all wait for it: two beside one busy process are slower than one alone.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import psutil
import torch

_EVERY_S = 2.0
_SPARE = 0.3  # of a core: so much others may use before a thread is given up for them
_CGROUP = Path("/sys/fs/cgroup")


def follow_load(model: Any) -> None:
    """Let PyTorch take as many threads as cores are free, looked at now and then as a model runs.

    At most those that it takes now, and those that a cgroup's quota leaves room for. Nothing is
    changed where `OMP_NUM_THREADS` says how many there are to be: sums are rounded otherwise by
    another number of threads, and so the same bytes need the same number.

    Args:
        model: a Transformers model that runs on the CPU.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    most = int(max(1, min(torch.get_num_threads(), quota())))
    torch.set_num_threads(most)
    if most > 1:
        model.get_input_embeddings().register_forward_pre_hook(_FollowLoad(most))


def quota(cgroup: Path = _CGROUP) -> float:
    """How many cores this process's cgroup may use; infinity where nothing says so.

    Source: the kernel's documentation of `cpu.max` (version 2) and `cpu.cfs_quota_us` (version 1).
    """
    try:
        if (second := cgroup / "cpu.max").is_file():
            most, period = second.read_text(encoding="ascii").split()
        else:
            first = cgroup / "cpu"
            most, period = (
                (first / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip()
                for name in ("quota", "period")
            )
        cores = int(most) / int(period)  # "max", or -1: no bound
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
    return cores if cores > 0 else math.inf


class _FollowLoad:
    """A forward hook that sets the number of threads by what was idle since it did so last."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.at, self.unused_s = _now()

    def __call__(self, *_: Any) -> None:
        if time.monotonic() - self.at < _EVERY_S:
            return
        (before, unused_before), (self.at, self.unused_s) = (self.at, self.unused_s), _now()
        free = (self.unused_s - unused_before) / (self.at - before)
        torch.set_num_threads(min(self.most, max(1, int(free + _SPARE))))


def _now() -> tuple[float, float]:
    """The time; and the seconds so far in which a core was idle, or worked for this process."""
    every, mine = psutil.cpu_times(percpu=True), os.times()
    try:
        allowed = [every[i] for i in os.sched_getaffinity(0)]
    except (AttributeError, IndexError):  # not on this system; or cores are numbered otherwise
        allowed = every
    idle = sum(times.idle + getattr(times, "iowait", 0.0) for times in allowed)
    return time.monotonic(), idle + mine.user + mine.system
