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

# The modules of version 0.1, and where their names are now, the first that has one.
MOVED: dict[str, tuple[str, ...]] = {
    "adapters": ("model.adapter", "model.sites", "model.formats", "settings.choices"),
    "attention": ("train.attention",),
    "bank": ("train.trainer",),
    "bench": ("probe.bench", "settings.choices"),
    "cached": ("train.cached", "train.activations", "train.packing"),
    "card": ("writer.card",),
    "cells": ("law.store",),
    "certificate": ("certify.certificate", "certify.mismatches", "core.files"),
    "check": ("measure.session", "measure.asking", "certify.check", "settings.audit"),
    "compare": ("probe.compare",),
    "damage": ("measure.damage", "data.texts", "core.intervals"),
    "engine": ("train.engine", "model.head"),
    "errors": ("core.errors",),
    "fits": ("law.fits",),
    "folder": ("writer.folder", "core.files"),
    "forward": ("model.forward",),
    "head": ("model.head",),
    "learner": ("train.learner", "settings.train", "core.observer"),
    "models": ("model.base", "core.files", "model.hashes", "settings.choices"),
    "objectives": ("settings.choices", "train.memft", "train.triage", "train.objective"),
    "plan": ("law.plan", "law.builtin"),
    "precondition": ("train.precondition", "train.retention"),
    "provenance": ("model.provenance",),
    "ray_launcher": ("probe.ray_launcher",),
    "recall": ("measure.examine", "measure.table", "measure.decode", "settings.choices"),
    "recall_law": ("law.recall_law", "law.recall_posterior", "law.share_law"),
    "records": ("data.record", "data.reading", "data.readers", "data.encoding"),
    "snapshots": ("train.snapshots",),
    "speed": ("train.speed",),
    "store": ("core.files",),
    "tasks": ("data.tasks", "data.texts"),
    "verify": ("probe.verify",),
}


class _Finder(MetaPathFinder, Loader):
    """Finds the old names; the import system asks it after everybody else."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        is_old = name.startswith("memlaw.") and name.removeprefix("memlaw.") in MOVED
        return ModuleSpec(name, self) if is_old else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        now = [f"memlaw.{module}" for module in MOVED[spec.name.removeprefix("memlaw.")]]
        said = f"{spec.name} is in {', '.join(now)} now."
        warnings.warn(said, DeprecationWarning, stacklevel=2)

        def load(name: str) -> Any:
            for module in now:
                found = importlib.import_module(module)
                if name in vars(found):
                    return vars(found)[name]
            raise AttributeError(f"module {spec.name!r} has no attribute {name!r}. {said}")

        old = ModuleType(spec.name, said)
        old.__getattr__ = load  # type: ignore[method-assign]
        return old

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def install() -> None:
    """Let the old names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
