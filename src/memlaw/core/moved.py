"""Modules that went by other names in version 0.1: their names still work, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ROOMS = {
    "core.errors": ("errors",),
    "data": ("records", "tasks"),
    "law": ("cells", "fits", "plan", "recall_law"),
    "model": ("adapters", "models"),
    "measure": ("damage", "recall"),
    "certify": ("certificate",),
    "train": ("bank", "cached", "engine", "learner"),
    "probe": ("bench", "ray_launcher", "verify"),
}
NOW = {"memlaw.check": "memlaw"} | {
    f"memlaw.{old}": f"memlaw.{new}" for new, names in ROOMS.items() for old in names
}


class _Finder(MetaPathFinder, Loader):
    """Finds the old names; the import system asks it after everybody else."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in NOW else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        now = NOW[spec.name]
        warnings.warn(f"{spec.name} is {now} now.", DeprecationWarning, stacklevel=2)
        found = ModuleType(spec.name, f"Stands for {now}.")
        found.__getattr__ = lambda name: _of(now, spec.name, name)  # type: ignore[method-assign]
        return found

    def exec_module(self, module: ModuleType) -> None:
        pass


def _of(now: str, old: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(now), name)
    except AttributeError as error:
        raise AttributeError(f"module {old!r}, now {now!r}, has no attribute {name!r}") from error


def install() -> None:
    """Let the old names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
