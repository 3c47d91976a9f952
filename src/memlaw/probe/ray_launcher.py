"""Run a probe's groups of cells as Ray tasks, into the same store, through a folder all can see."""

from __future__ import annotations

import dataclasses
import functools
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from memlaw.core.errors import ConfigError
from memlaw.core.observer import Spec
from memlaw.probe.prober import Prober
from memlaw.probe.run import failed_cells, run_group
from memlaw.settings.probe import ProbeConfig

_IN_FLIGHT = 1000  # tasks that Ray knows of at a time


def ray_launcher(
    *, address: str | None = None, cpus: float = 2, gpus: float = 0
) -> Callable[..., Iterator[list[tuple[Spec, str, dict[str, Any]]]]]:
    """A launcher for `memlaw.probe.probe`.

    Each group of cells that are trained together is a task. The store's folder, the task's files
    and a model that is a folder must be where every node sees them by the same path.

    Args:
        address: of a cluster, as `ray.init` takes it; default: the one this machine belongs to, or
            a new one on this machine.
        cpus, gpus: what a task claims. PyTorch gets as many threads as it has CPUs.

    Raises:
        ConfigError: Ray isn't installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "--launcher ray needs Ray, which isn't installed: pip install 'memlaw[ray]'."
        ) from error

    def launch(
        prober: Prober, groups: Sequence[Sequence[Spec]], out: Path
    ) -> Iterator[list[tuple[Spec, str, dict[str, Any]]]]:
        if not groups:
            return
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
            signal.signal(signal.SIGTERM, on_terminate)  # Ray's would exit without a word
        try:
            _check_resources(ray.cluster_resources(), {"CPU": cpus, "GPU": gpus})
            task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)(_run)
            config = _with_whole_paths(prober.config)
            waiting = list(reversed(groups))
            running: dict[Any, Sequence[Spec]] = {}
            while waiting or running:
                while waiting and len(running) < _IN_FLIGHT:
                    group = waiting.pop()
                    keys = [prober.key(spec) for spec in group]
                    threads = max(1, int(cpus))
                    running[
                        task.remote(config, list(group), keys, str(out.absolute()), threads)
                    ] = group
                (ready,), _ = ray.wait(list(running), num_returns=1)
                group = running.pop(ready)
                try:
                    yield ray.get(ready)
                except ray.exceptions.RayError as error:  # the process died, or never began
                    yield failed_cells(prober, group, out, str(error), wall_s=0.0)
        finally:
            if started_here:
                ray.shutdown()

    return launch


def _check_resources(there: dict[str, float], wanted: dict[str, float]) -> None:
    for name, n in wanted.items():
        if n > there.get(name, 0.0):
            raise ConfigError(
                f"a task claims {n:g} {name}s, and the Ray cluster has {there.get(name, 0.0):g}. "
                f"Lower --ray-{name.lower()}s."
            )


def _with_whole_paths(config: ProbeConfig) -> ProbeConfig:
    """The same settings for a process that works in another folder."""
    texts: dict[str, Any] = {
        name: str(Path(value).absolute())
        for name in ("natural_text", "retain", "damage_text")
        if (value := getattr(config, name)) is not None
    }
    kind, _, path = config.task.partition(":")
    if kind in ("text", "records"):
        texts["task"] = f"{kind}:{Path(path).absolute()}"
    if Path(config.model).exists():
        texts["model"] = str(Path(config.model).absolute())
    return dataclasses.replace(config, **texts)


def _run(
    config: ProbeConfig, group: Sequence[Spec], keys: Sequence[str], out: str, threads: int
) -> list[tuple[Spec, str, dict[str, Any]]]:
    import torch

    torch.set_num_threads(threads)
    prober = _prober(config)
    if keys != [prober.key(spec) for spec in group]:
        raise ConfigError(
            "this worker would train other cells than were asked for: its device, files, model or "
            "Python differ from the driver's. Say --device, and give all nodes the same "
            "environment."
        )
    return run_group(prober, group, Path(out))


@functools.lru_cache(maxsize=1)
def _prober(config: ProbeConfig) -> Prober:
    return Prober(config)
