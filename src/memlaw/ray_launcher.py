"""Run a probe's groups of cells as Ray tasks, into the same store, through a folder all can see."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from memlaw.errors import ConfigError
from memlaw.probe import ProbeConfig, Prober, Spec, failed_cells, run_group


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
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=1)(_run)
        threads = max(1, int(cpus))
        try:
            pending = {
                task.remote(prober.config, list(group), str(out.absolute()), threads): group
                for group in groups
            }
            while pending:
                (ready,), _ = ray.wait(list(pending), num_returns=1)
                group = pending.pop(ready)
                try:
                    yield ray.get(ready)
                except ray.exceptions.RayError as error:  # the process died, or never began
                    yield failed_cells(prober, group, out, str(error), wall_s=0.0)
        finally:
            if started_here:
                ray.shutdown()

    return launch


def _run(
    config: ProbeConfig, group: Sequence[Spec], out: str, threads: int
) -> list[tuple[Spec, str, dict[str, Any]]]:
    import torch

    torch.set_num_threads(threads)
    return run_group(_prober(config), group, Path(out))


@functools.lru_cache(maxsize=1)
def _prober(config: ProbeConfig) -> Prober:
    return Prober(config)
