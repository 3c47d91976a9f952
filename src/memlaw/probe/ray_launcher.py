"""Run a probe's groups of cells as Ray tasks, into the same store, through a folder all can see."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from memlaw.core.errors import ConfigError
from memlaw.core.observer import Spec
from memlaw.core.ray_tasks import ray_tasks, require_ray
from memlaw.probe.prober import Prober
from memlaw.probe.run import failed_cells, run_group
from memlaw.settings.probe import ProbeConfig


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
    require_ray()

    def launch(
        prober: Prober, groups: Sequence[Sequence[Spec]], out: Path
    ) -> Iterator[list[tuple[Spec, str, dict[str, Any]]]]:
        if not groups:
            return
        config, threads = _with_whole_paths(prober.config), max(1, int(cpus))
        jobs = []
        for group in groups:
            keys = [prober.key(spec) for spec in group]
            jobs.append((config, list(group), keys, str(out.absolute()), threads))
        for number, outcomes, error in ray_tasks(_run, jobs, address=address, cpus=cpus, gpus=gpus):
            if error is not None:
                outcomes = failed_cells(prober, groups[number], out, str(error), wall_s=0.0)
            yield outcomes

    return launch


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
    for name in ("model", "tokenizer"):
        value = getattr(config, name)
        if value is not None and Path(value).exists():
            texts[name] = str(Path(value).absolute())
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
