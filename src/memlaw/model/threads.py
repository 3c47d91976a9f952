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
_SURE = 5  # looks in a row must find more cores free, until more are taken: others look, too
_SPARE = 0.3  # of a core: so much others may use before a thread is given up for them
_MOUNT, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def follow_load(model: Any) -> None:
    """Let PyTorch take as many threads as cores are free, looked at now and then as a model runs.

    At most those that PyTorch takes by itself, or was told to, and those that a cgroup's quota
    leaves room for. Nothing is changed where `OMP_NUM_THREADS` says how many there are to be: sums
    are rounded otherwise by another number of threads, and so the same bytes need the same number.

    Args:
        model: a Transformers model that runs on the CPU.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    _FOLLOWER.begin()
    if _FOLLOWER.most > 1:
        model.get_input_embeddings().register_forward_pre_hook(_FOLLOWER)


def most_threads() -> int:
    """How many threads PyTorch takes where nothing else runs."""
    return max(_FOLLOWER.most, torch.get_num_threads())


def quota(mount: Path = _MOUNT, membership: Path = _MEMBERSHIP) -> float:
    """How many cores the cgroups of this process may use; infinity where nothing says so.

    Source: the kernel's documentation of `cpu.max` (version 2) and `cpu.cfs_quota_us` (version 1).
    """
    found = [_quota_of(mount), _quota_of(mount / "cpu")]  # as containers see their own
    try:
        lines = [line.split(":", 2) for line in membership.read_text("utf-8").splitlines()]
    except (OSError, ValueError):
        lines = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = mount / "cpu" if controllers else mount
        at = top / path.strip("/")
        found += [_quota_of(at), *(_quota_of(up) for up in at.parents if top in up.parents)]
    return min(found)


def _quota_of(cgroup: Path) -> float:
    try:
        if (second := cgroup / "cpu.max").is_file():
            most, period = second.read_text(encoding="ascii").split()
        else:
            most = (cgroup / "cpu.cfs_quota_us").read_text(encoding="ascii")
            period = (cgroup / "cpu.cfs_period_us").read_text(encoding="ascii")
        cores = int(most) / int(period)  # "max", or -1: no bound
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
    return cores if cores > 0 else math.inf


class _FollowLoad:
    """A forward hook that sets the number of threads by what was idle since it looked last.

    Attributes:
        most: threads, as PyTorch began, or was told by others since; 0 before it began.
    """

    def __init__(self) -> None:
        self.most = self.now = self.n_more = 0

    def begin(self) -> None:
        """Look from now on."""
        if torch.get_num_threads() != self.now:  # it wasn't this that set them
            self.most = int(max(1, min(torch.get_num_threads(), quota())))
            self._take(self.most)
        self.at, self.unused_s = _now()

    def __call__(self, *_: Any) -> None:
        if time.monotonic() - self.at < _EVERY_S:
            return
        (before, unused_before), (self.at, self.unused_s) = (self.at, self.unused_s), _now()
        free = (self.unused_s - unused_before) / (self.at - before)
        room = min(self.most, max(1, int(free + _SPARE)))
        self.n_more = self.n_more + 1 if room > self.now else 0
        if room < self.now or self.n_more >= _SURE:
            self._take(room)

    def _take(self, n: int) -> None:
        self.now, self.n_more = n, 0
        torch.set_num_threads(n)


_FOLLOWER = _FollowLoad()  # of all models: the number of threads is the process's


def _now() -> tuple[float, float]:
    """The time; and the seconds so far in which a core was idle, or worked for this process."""
    at, mine = time.monotonic(), os.times()
    try:
        every = psutil.cpu_times(percpu=True)
    except Exception:  # whatever a system says that doesn't tell: then all counts as free
        return at, at * (os.cpu_count() or 1)
    try:
        allowed = [every[i] for i in os.sched_getaffinity(0)]
    except (AttributeError, IndexError):  # not on this system; or cores are numbered otherwise
        allowed = every
    idle = sum(times.idle + getattr(times, "iowait", 0.0) for times in allowed)
    return at, idle + mine.user + mine.system
