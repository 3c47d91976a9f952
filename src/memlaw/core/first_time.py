"""How long a run takes, and how much of that it took for what is kept and made only once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class _Spent(threading.local):
    """Of a thread: seconds spent on what is kept, and whether some of it is being made."""

    seconds = 0.0
    making = False


_spent = _Spent()


@dataclass
class Once:
    """What is done once: whether it was `kept`."""

    kept: bool = True


@contextmanager
def once() -> Iterator[Once]:
    """What is done within the block is kept, and won't be done again in a later run.

    Where it can't be kept the block says so, and it isn't counted.
    """
    done = Once()
    if _spent.making:  # it is a part of what is timed already
        yield done
        return
    began, _spent.making = time.perf_counter(), True
    try:
        yield done
    finally:
        _spent.making = False
        if done.kept:
            _spent.seconds += time.perf_counter() - began


@contextmanager
def each_time() -> Iterator[None]:
    """What is kept within the block isn't counted: other data make it anew."""
    was, _spent.making = _spent.making, True
    try:
        yield
    finally:
        _spent.making = was


class Stopwatch:
    """Runs from when it is made, in one thread."""

    def __init__(self) -> None:
        self._began, self._spent_s = time.perf_counter(), _spent.seconds

    @property
    def wall_s(self) -> float:
        """Seconds since then."""
        return time.perf_counter() - self._began

    @property
    def once_s(self) -> float:
        """How many of them went into what a later run doesn't do again."""
        return _spent.seconds - self._spent_s
