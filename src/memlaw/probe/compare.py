"""Objectives against each other: pairs of cells that differ in nothing but what was trained for.

Cells of one seed share data, initialisation and order, so they are compared pair by pair. Seeds
are what is drawn at random: each counts once, as the mean of its pairs, and intervals are over
seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

Row = dict[str, Any]
BASELINE = "sft"
EDGE = (0.05, 0.95)  # of the baseline's recall
_SAME = (  # what the cells of a pair have in common
    *("task", "recipe", "placement", "layers", "length", "rank", "seed", "dtype", "base_sha256"),
    *("data_sha256", "learning_rate", "batch_size", "total_steps", "whiten", "retention"),
)
# What is compared, each a function of a row.
MEASURES: dict[str, Callable[[Row], float]] = {
    "records recited": lambda row: row["recall"] * row["n_records"],
    "records certified": lambda row: row["share_certified"] * row["n_records"],
    "token accuracy": lambda row: row["token_accuracy"],
    "verbatim prefix": lambda row: row["verbatim_prefix"],
    "share under p 0.55": lambda row: row["share_under"],
    "loss": lambda row: row["nll"],
    "ΔNLL on unseen text": lambda row: row["damage_nll"],
    "relapses a token": lambda row: row["relapses_per_token"],
    "TFLOP": lambda row: row["train_flop"] / 1e12,
}


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A measure of an objective beside the baseline's.

    Attributes:
        mean, baseline_mean: over seeds.
        difference: mean − baseline_mean, with `low` and `high`, its 95 % interval (Student's t of
            the seeds' differences); None where there is one seed.
        ratio: mean / baseline_mean, with its 95 % interval (Fieller 1954); None where the
            baseline's mean isn't above 0 for certain. An end is infinite where it is open.
    """

    mean: float
    baseline_mean: float
    difference: float
    low: float | None
    high: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An objective beside the baseline.

    Attributes:
        objective: as `variant` names it.
        baseline: likewise.
        cells: [(task, length, rank)] that were compared.
        n_seeds: seeds that have them all, with either objective.
        measures: by name, see `MEASURES`.
        certified: pairs in which every token passed the line: with this objective, with the
            baseline, of how many.
        steps: of the pairs in which both did: mean steps to the certificate, this and the
            baseline's; None where there are none.
    """

    objective: str
    baseline: str
    cells: list[tuple[str, int, int]]
    n_seeds: int
    measures: dict[str, Paired]
    certified: tuple[int, int, int]
    steps: tuple[float, float] | None = field(default=None)


def variant(row: Row) -> str:
    """The objective of a cell, and what it does with an empty batch where that isn't to skip it."""
    falls_back = row["objective"] == "memft_threshold" and row["on_empty"] == "sft"
    return "memft_threshold:sft" if falls_back else row["objective"]


def cell_of(row: Row) -> tuple[str, int, int]:
    """Task, length and rank."""
    return row["task"], row["length"], row["rank"]


def at_the_edge(rows: Sequence[Row], baseline: str = BASELINE) -> set[tuple[str, int, int]]:
    """The cells in which the baseline recalls between 5 and 95 %, mean of its seeds.

    Of records; of tokens where there is one record only.
    """
    found: dict[tuple[str, int, int], list[float]] = {}
    for row in rows:
        if variant(row) == baseline:
            share = row["recall"] if row["n_records"] > 1 else row["token_accuracy"]
            found.setdefault(cell_of(row), []).append(share)
    return {cell for cell, of in found.items() if EDGE[0] <= sum(of) / len(of) <= EDGE[1]}


def compare(rows: Sequence[Row], objective: str, baseline: str = BASELINE) -> Comparison | None:
    """Two objectives on the cells that both have.

    Args:
        rows: successful cells as `memlaw.law.read_cells` gives them. A seed counts if it has
            all the pairs that any seed has.
        objective, baseline: as `variant` names them.

    Returns:
        The comparison; None where no pair is there.
    """
    sides: dict[str, dict[tuple[Any, ...], Row]] = {objective: {}, baseline: {}}
    for row in rows:
        if variant(row) in sides:
            sides[variant(row)][tuple(str(row[name]) for name in _SAME)] = row
    pairs = [
        (row, sides[baseline][key])
        for key, row in sides[objective].items()
        if key in sides[baseline]
    ]
    cells = sorted({cell_of(row) for row, _ in pairs})
    by_seed: dict[int, list[tuple[Row, Row]]] = {}
    for pair in pairs:
        by_seed.setdefault(pair[0]["seed"], []).append(pair)
    whole = {
        seed: of for seed, of in by_seed.items() if {cell_of(row) for row, _ in of} == set(cells)
    }
    if not whole:
        return None
    kept = [pair for of in whole.values() for pair in of]
    both = [
        (a["steps_to_certificate"], b["steps_to_certificate"])
        for a, b in kept
        if a["certified"] and b["certified"]
    ]
    return Comparison(
        objective=objective,
        baseline=baseline,
        cells=cells,
        n_seeds=len(whole),
        measures={
            name: paired(
                [float(np.mean([measure(a) for a, _ in of])) for of in whole.values()],
                [float(np.mean([measure(b) for _, b in of])) for of in whole.values()],
            )
            for name, measure in MEASURES.items()
        },
        certified=(
            sum(a["certified"] for a, _ in kept),
            sum(b["certified"] for _, b in kept),
            len(kept),
        ),
        steps=(
            (float(np.mean([a for a, _ in both])), float(np.mean([b for _, b in both])))
            if both
            else None
        ),
    )


def paired(values: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Difference and ratio of the means of paired samples, with 95 % intervals.

    Args:
        values, baseline: [n] one number a seed, in the same order.
    """
    y, x = np.asarray(values, dtype=float), np.asarray(baseline, dtype=float)
    n = len(y)
    low = high = None
    ratio: float | None = None
    bounds: tuple[float | None, float | None] = (None, None)
    if n > 1:
        t = float(stats.t.ppf(0.975, n - 1))
        half = t * float((y - x).std(ddof=1)) / math.sqrt(n)
        low, high = float((y - x).mean()) - half, float((y - x).mean()) + half
        bounds = _fieller(y, x, t)
    if x.mean() > 0 and (n == 1 or bounds[0] is not None):
        ratio = float(y.mean() / x.mean())
    return Paired(
        mean=float(y.mean()),
        baseline_mean=float(x.mean()),
        difference=float((y - x).mean()),
        low=low,
        high=high,
        ratio=ratio,
        ratio_low=bounds[0],
        ratio_high=bounds[1],
    )


def _fieller(
    y: np.ndarray[Any, Any], x: np.ndarray[Any, Any], t: float
) -> tuple[float | None, float | None]:
    """The ratios ρ for which the mean of y − ρx isn't told from 0; none if x's isn't either."""
    n = len(y)
    (var_y, cov), (_, var_x) = np.cov(y, x) / n
    a = x.mean() ** 2 - t**2 * var_x
    b = x.mean() * y.mean() - t**2 * cov
    c = y.mean() ** 2 - t**2 * var_y
    if a <= 0 or x.mean() <= 0:
        return None, None
    root = math.sqrt(max(0.0, b**2 - a * c))
    return float((b - root) / a), float((b + root) / a)
