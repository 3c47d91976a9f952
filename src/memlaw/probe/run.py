"""The memory probe: a grid of adapters over rank and length, and what each of them remembers.

The cells of a grid that share a length are trained side by side, in one `AdapterBank` and from one
activation cache; they come into the store together.

Source of the probe: arXiv 2605.30260.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlaw.core.errors import ConfigError
from memlaw.core.observer import Observer, Spec
from memlaw.law.store import Cell, CellStore, read_cells
from memlaw.probe.prober import Prober
from memlaw.settings.probe import ProbeConfig


class ProbeObserver(Observer):
    """An observer as in version 0.1: its `epoch` is called where others' `steps` is."""

    def epoch(  # type: ignore[override]
        self, specs: Sequence[Spec], step: int, steps: int, nll_nats: float
    ) -> None:
        """Cells that are trained together have done `step` of `steps` optimiser steps."""

    def steps(self, specs: Sequence[Spec], step: int, steps: int, nll_nats: float) -> None:
        """Calls `epoch`."""
        self.epoch(specs, step, steps, nll_nats)


Outcome = tuple[Spec, str, dict[str, Any]]  # a cell, its status, and what was found or the error
Launcher = Callable[[Prober, Sequence[Sequence[Spec]], Path], Iterator[list[Outcome]]]


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What `probe` found.

    Attributes:
        cells: a flat row for each cell of the grid, see `memlaw.law.read_cells`. Of a success:

            n_records, n_tokens: what was to be remembered; n_tokens counts target tokens.
            n_parameters: trained numbers. bits_stored, bits_per_parameter: by how many bits fewer
            the targets take to tell.
            base_nll, nll, delta_nll: nats a target token, of the bare and the adapted model, and
            by how much it fell. saturated: nll is under a twentieth of base_nll.
            token_accuracy: share of target tokens that are the argmax. share_under: share with
            p < 0.55, teacher-forced. min_p, p_01, p_05, p_25, p_50: quantiles of p.
            recall: share of records recited. verbatim_prefix: mean share of a target before its
            first wrong token. certified: no token is under p 0.55, teacher-forced, and where greedy
            decoding was run (`decode`), it agrees.
            share_certified: share of records that pass likewise.
            n_steps: optimiser steps. train_flop: operations of the training, see `EpochStats`.
            relapses_per_token: how often a target token fell back under the line, looked at
            once an epoch. steps_to_certificate: after how many no token was seen under
            the line, looked at once an epoch, batch by batch, and at the end; None if never.
            damage_nll, damage_low, damage_high: rise of the loss on unseen text, in nats a token,
            with its 95 % interval.
        n_run: how many of them were run now.
        n_failed: how many of them failed.
        wall_s: seconds it took, loading included.
    """

    cells: list[dict[str, Any]]
    n_run: int
    n_failed: int
    wall_s: float


def probe(
    out: str | Path,
    config: ProbeConfig | None = None,
    *,
    launcher: Launcher | None = None,
    observer: Observer | None = None,
) -> ProbeResult:
    """Train an adapter for each cell of a grid that has no result yet, and measure it.

    Args:
        out: the store; any number of grids may share one.
        config: what to probe.
        launcher: runs groups of cells: a function of (prober, groups, out) that yields for each
            group what became of its cells; default: `run_here`, one after the other;
            `memlaw.probe.ray_launcher.ray_launcher` makes another.
        observer: is told of progress.

    Returns:
        The cells of the grid.

    Raises:
        MemlawError: a child that says what was wrong with settings, model, task or folder.
    """
    config = config or ProbeConfig()
    observer = observer or Observer()
    started = time.perf_counter()
    store = CellStore(out)
    store.check_writable()
    store.recover()
    prober = Prober(config, observer)
    keys = {prober.key(spec): spec for spec in prober.specs()}
    finished = store.finished(keys, observer.notice)
    there = read_cells(out, observer.notice, keys=finished) if finished else []
    observer.grid(config, there, len(keys))
    missing = [spec for key, spec in keys.items() if key not in finished]
    for group in (launcher or run_here)(prober, prober.groups(missing), Path(out)):
        for spec, status, result in group:
            observer.cell(spec, status, result)
    rows = read_cells(out, observer.notice, keys=keys)
    return ProbeResult(
        cells=rows,
        n_run=len(missing),
        n_failed=len(keys) - sum(row["status"] == "success" for row in rows),
        wall_s=time.perf_counter() - started,
    )


def run_here(
    prober: Prober, groups: Sequence[Sequence[Spec]], out: Path
) -> Iterator[list[Outcome]]:
    """Run groups one after the other in this process."""
    store = CellStore(out)
    for group in groups:
        keys = [prober.key(spec) for spec in group]
        if len(store.finished(keys, lambda text: None)) < len(group):  # not by another, meanwhile
            yield run_group(prober, group, out)


def run_group(prober: Prober, group: Sequence[Spec], out: Path) -> list[Outcome]:
    """Train and measure the cells of a group, and put them into the store."""
    started = time.perf_counter()
    try:
        cells = prober.run(group)
    except ConfigError:  # no room for activations, say: the next group would fare alike
        raise
    except Exception:
        error = traceback.format_exc()
        return failed_cells(prober, group, out, error, wall_s=time.perf_counter() - started)
    CellStore(out).put(cells)
    return [
        (spec, cell.status, dict(cell.result or {"error": cell.error}))
        for spec, cell in zip(group, cells, strict=True)
    ]


def failed_cells(
    prober: Prober, group: Sequence[Spec], out: Path, error: str, *, wall_s: float
) -> list[Outcome]:
    """Put into the store that a group came to nothing."""
    provenance = prober.provenance(group, wall_s)
    CellStore(out).put(
        [
            Cell(config=prober.identity(spec), status="failed", error=error, provenance=provenance)
            for spec in group
        ]
    )
    return [(spec, "failed", {"error": error}) for spec in group]
