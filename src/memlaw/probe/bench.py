"""The same grid, once for each objective: which of them remembers most of it?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memlaw.core.errors import ConfigError
from memlaw.core.observer import Observer
from memlaw.probe.compare import BASELINE, Comparison, Row, at_the_edge, cell_of, compare
from memlaw.probe.run import ProbeResult, probe
from memlaw.settings.choices import VARIANTS, OnEmpty, resolve_objective
from memlaw.settings.probe import ProbeConfig


def with_objective(config: ProbeConfig, name: str) -> ProbeConfig:
    """The probe of an objective; `memft_threshold:sft` trains sft where a batch is empty.

    Raises:
        ConfigError: there is none of that name.
    """
    objective, _, on_empty = name.partition(":")
    if on_empty and (objective, on_empty) != ("memft_threshold", "sft"):
        raise ConfigError(f"no objective '{name}'. There are {', '.join(VARIANTS)}.")
    empty: OnEmpty = "sft" if on_empty else "skip"
    return dataclasses.replace(config, objective=resolve_objective(objective), on_empty=empty)


@dataclass(frozen=True, kw_only=True)
class ObjectivesResult:
    """What `compare_objectives` found.

    Attributes:
        results: of the probe with each objective.
        everywhere: each objective beside SFT, on all cells.
        at_the_edge: on those in which SFT recalls 5 to 95 %; empty if there are none.
    """

    results: list[ProbeResult]
    everywhere: list[Comparison]
    at_the_edge: list[Comparison]

    @property
    def n_failed(self) -> int:
        """Cells that failed."""
        return sum(result.n_failed for result in self.results)

    def to_json(self) -> dict[str, Any]:
        """The comparisons and the cells, as JSON has them: no infinities."""
        return {
            "everywhere": [asdict(comparison) for comparison in self.everywhere],
            "at_the_edge": [asdict(comparison) for comparison in self.at_the_edge],
            "cells": [row for result in self.results for row in result.cells],
        }


def compare_objectives(
    out: str | Path,
    config: ProbeConfig,
    names: Sequence[str] = VARIANTS,
    *,
    launcher: Callable[..., Any] | None = None,
    observer: Observer | None = None,
) -> ObjectivesResult:
    """Probe the grid with each objective, and compare them with SFT pair by pair.

    Cells of one seed share data, initialisation and order of records. What the store has isn't
    run again.

    Args:
        out: the store.
        config: the grid; its objective is not looked at.
        names: objectives, sft among them.
        launcher, observer: as `probe` takes them.

    Raises:
        ConfigError: an objective that isn't there, or sft missing.
    """
    if BASELINE not in names:
        raise ConfigError(f"objectives {', '.join(names)}: add sft, which all are compared with.")
    configs = [with_objective(config, name) for name in dict.fromkeys(names)]
    results = [probe(out, c, launcher=launcher, observer=observer) for c in configs]
    rows = [row for result in results for row in result.cells if row["status"] == "success"]
    edge = at_the_edge(rows)
    others = [name for name in dict.fromkeys(names) if name != BASELINE]

    def beside_sft(some: Sequence[Row]) -> list[Comparison]:
        found = [compare(some, name) for name in others]
        return [comparison for comparison in found if comparison is not None]

    return ObjectivesResult(
        results=results,
        everywhere=beside_sft(rows),
        at_the_edge=beside_sft([row for row in rows if cell_of(row) in edge]),
    )
