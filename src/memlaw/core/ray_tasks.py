"""Calls of one function as tasks of a Ray cluster."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from memlaw.core.errors import ConfigError

_IN_FLIGHT = 1000  # tasks that Ray knows of at a time


def require_ray() -> ModuleType:
    """Ray.

    Raises:
        ConfigError: it isn't installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "--launcher ray needs Ray, which isn't installed: pip install 'memlaw[ray]'."
        ) from error
    return ray


def ray_tasks(
    function: Callable[..., Any],
    jobs: Sequence[Sequence[Any]],
    *,
    address: str | None,
    cpus: float,
    gpus: float,
) -> Iterator[tuple[int, Any, Exception | None]]:
    """Call a function once with each job's arguments, as Ray tasks.

    Args:
        function: of a module that every node can import.
        jobs: arguments.
        address: of a cluster, as `ray.init` takes it; None: the one this machine belongs to, or a
            new one on this machine.
        cpus, gpus: what a task claims.

    Yields:
        In the order in which they end: the job's number, what the function returned, and None; or
        None, and what was raised, if only that its process died.

    Raises:
        ConfigError: no cluster answers, or none that has so much; or Ray isn't installed.
    """
    ray: Any = require_ray()
    started_here = not ray.is_initialized()
    if started_here:
        on_terminate = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        except ConnectionError as error:
            raise ConfigError(
                f"no Ray cluster answers at {address}. Check --ray-address, or leave it out "
                "for one on this machine."
            ) from error
    try:
        if started_here and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray's would exit without a word
        _check_resources(ray.cluster_resources(), {"CPU": cpus, "GPU": gpus})
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)(function)
        waiting = list(reversed(range(len(jobs))))
        running: dict[Any, int] = {}
        while waiting or running:
            while waiting and len(running) < _IN_FLIGHT:
                number = waiting.pop()
                running[task.remote(*jobs[number])] = number
            (ready,), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(ready)
            try:
                yield number, ray.get(ready), None
            except ray.exceptions.RayError as error:  # the process died, or never began
                yield number, None, error
    finally:
        if started_here:
            ray.shutdown()


def _check_resources(there: dict[str, float], wanted: dict[str, float]) -> None:
    for name, n in wanted.items():
        if n > there.get(name, 0.0):
            raise ConfigError(
                f"a task claims {n:g} {name}s, and the Ray cluster has {there.get(name, 0.0):g}. "
                f"Lower --ray-{name.lower()}s."
            )
