"""All the laws of a store: cells grouped by setting, all laws fitted to each group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from memlaw.law.comparison import FormResult, compare_cells
from memlaw.law.estimator import LawError, checked_rows
from memlaw.law.forms import FORMS
from memlaw.law.memory_law import MemoryLaw
from memlaw.law.recall_law import RecallLaw
from memlaw.law.rows import (
    SETTING_COLUMNS,
    CellRow,
    Covariate,
    finished_cells,
    number,
    split_by_setting,
)
from memlaw.law.share_law import ShareLaw


@dataclass(frozen=True, kw_only=True)
class GridPoint:
    """The cells of one rank and length.

    Attributes:
        rank, length: of these cells.
        base_nll, delta_nll: means over seeds, nats per token.
        fitted: what the memory law predicts for delta_nll, nats per token; None without a law.
        saturated: at least one of the cells is.
    """

    rank: int
    length: int
    base_nll: float
    delta_nll: float
    fitted: float | None
    saturated: bool


@dataclass(frozen=True, kw_only=True)
class StoreFit:
    """The laws of the cells of one setting.

    Attributes:
        setting: what the cells have in common.
        n_cells, n_saturated, n_certified: how many cells there are, how many are saturated (their
            loss is close to 0), and how many are certified.
        law: the law of ΔL, in the form asked for; None where it can't be fitted.
        comparison: all forms, best AICc first; empty where they can't be fitted.
        recall: the law of P(certified); None where no cell is certified, or all are.
        share: the law of the share of tokens below the required probability; None where it can't
            be fitted.
        problems: sentences that say why something above is None or empty.
        grid: what was measured and what the law predicts, in the order of rank and length.
    """

    setting: Mapping[str, Any]
    n_cells: int
    n_saturated: int
    n_certified: int
    law: MemoryLaw | None
    comparison: Sequence[FormResult]
    recall: RecallLaw | None
    share: ShareLaw | None
    problems: tuple[str, ...]
    grid: tuple[GridPoint, ...]

    @property
    def r2_of_means(self) -> float | None:
        """R² on means over seeds, without saturated points; None without a law or two points."""
        free = [point for point in self.grid if not point.saturated]
        if self.law is None or len(free) < 2:
            return None
        measured = np.array([point.delta_nll for point in free])
        fitted = np.array([point.fitted for point in free], dtype=float)
        return float(
            1 - ((measured - fitted) ** 2).sum() / ((measured - measured.mean()) ** 2).sum()
        )

    def to_json(self) -> dict[str, Any]:
        """As values for JSON; infinite or missing numbers (open ends of intervals) are None."""
        found: dict[str, Any] = {
            "setting": dict(self.setting),
            "n_cells": self.n_cells,
            "n_saturated": self.n_saturated,
            "n_certified": self.n_certified,
            "problems": list(self.problems),
            "comparison": [asdict(result) for result in self.comparison],
            "grid": [asdict(point) for point in self.grid],
        }
        if self.law is not None:
            found["r2_of_means"] = self.r2_of_means
            found["law"] = {
                "form": self.law.form,
                "covariate": self.law.covariate,
                "confidence": self.law.confidence,
                **_estimates(self.law),
                "sigma": self.law.sigma_,
                "tau": self.law.tau_,
                "r2": self.law.r2_,
                "aicc": self.law.aicc_,
                "n_effective": self.law.n_effective_,
                "identifiability": list(self.law.identifiability_.statements),
            }
        if self.recall is not None:
            found["recall"] = {
                **_estimates(self.recall),
                "centre_tokens": self.recall.centre_tokens_,
                "n_contradictions": self.recall.n_contradictions_,
            }
        if self.share is not None:
            found["share_under"] = {**_estimates(self.share), "r2": self.share.r2_}
        return _finite(found)


def _finite(value: Any) -> Any:
    """The same, with None for numbers that JSON doesn't have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _estimates(law: MemoryLaw | RecallLaw | ShareLaw) -> dict[str, Any]:
    return {
        "params": law.params_,
        "intervals": {name: list(ends) for name, ends in law.intervals_.items()},
    }


def fit_store(
    cells: Sequence[CellRow],
    *,
    form: str = "paper",
    covariate: Covariate = "rank",
    task: str | None = None,
) -> list[StoreFit]:
    """Fit the laws of each setting that a store holds.

    Args:
        cells: rows, as `read_cells` gives them. Failed cells are left out.
        form: of the memory law; a name in `FORMS`.
        covariate: what the size of an adapter is: rank, or trainable parameters.
        task: fit cells of this task only; None: of all tasks.

    Returns:
        A fit for each setting (see `split_by_setting`), in the order of task, recipe and so on.

    Raises:
        LawError: no such form; no finished cell, or none of that task.
    """
    if form not in FORMS:
        raise LawError(f"There is no form {form!r}; there are {', '.join(FORMS)}.")
    finished = finished_cells(cells)
    chosen = [cell for cell in finished if task in (None, cell.get("task"))]
    if not chosen:
        tasks = sorted({str(cell.get("task")) for cell in finished})
        raise LawError(
            f"No finished cell{f' of task {task}' if task else ''} among {len(cells)}"
            + (f"; there are {', '.join(tasks)}." if tasks else ". Run the probe first.")
        )
    settings = split_by_setting(chosen)
    return [_fit(settings[key], form, covariate) for key in sorted(settings)]


def _fit(cells: Sequence[CellRow], form: str, covariate: Covariate) -> StoreFit:
    problems = []
    law, comparison, recall, share = None, [], None, None
    try:
        law = MemoryLaw(form, covariate).fit_cells(cells)
    except LawError as error:
        problems.append(f"memory law: {error}")
    try:
        comparison = compare_cells(cells, covariate)
    except LawError as error:
        problems.append(f"comparison of forms: {error}")
    n_certified = sum(bool(cell.get("certified")) for cell in cells)
    if 0 < n_certified < len(cells):
        try:
            recall = RecallLaw(covariate).fit_cells(cells)
        except LawError as error:
            problems.append(f"recall law: {error}")
    else:
        problems.append(
            f"recall law: {'every' if n_certified else 'no'} cell is certified. Probe "
            f"{'smaller ranks or longer' if n_certified else 'larger ranks or shorter'} targets."
        )
    try:
        share = ShareLaw(covariate).fit_cells(cells)
    except LawError as error:
        problems.append(f"share of tokens under the line: {error}")
    return StoreFit(
        setting={name: cells[0].get(name) for name in SETTING_COLUMNS},
        n_cells=len(cells),
        n_saturated=sum(bool(cell.get("saturated")) for cell in cells),
        n_certified=n_certified,
        law=law,
        comparison=comparison,
        recall=recall,
        share=share,
        problems=tuple(problems),
        grid=_grid(cells, law, covariate),
    )


def _grid(
    cells: Sequence[CellRow], law: MemoryLaw | None, covariate: Covariate
) -> tuple[GridPoint, ...]:
    together: dict[tuple[int, int], list[CellRow]] = {}
    for cell in cells:
        at = int(number(cell, "rank")), int(number(cell, "length"))
        together.setdefault(at, []).append(cell)
    points = []
    for (rank, length), found in sorted(together.items()):
        size = "rank" if covariate == "rank" else "n_parameters"
        columns = (size, "n_tokens", "base_nll")
        X = checked_rows([[number(c, name) for name in columns] for c in found], *columns)
        points.append(
            GridPoint(
                rank=rank,
                length=length,
                base_nll=float(X[:, 2].mean()),
                delta_nll=sum(number(c, "delta_nll") for c in found) / len(found),
                fitted=None if law is None else float(law.predict(X).mean()),
                saturated=any(bool(number(c, "saturated")) for c in found),
            )
        )
    return tuple(points)
