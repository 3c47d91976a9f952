"""What a report shows of a probe: its cells by setting, and the law that was fitted to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memlaw.law.comparison import compare_cells
from memlaw.law.estimator import LawError
from memlaw.law.forms import FORMS
from memlaw.law.memory_law import MemoryLaw
from memlaw.law.rows import (
    SETTING_COLUMNS,
    CellRow,
    cell_arrays,
    finished_cells,
    number,
    split_by_setting,
)
from memlaw.report.plan_view import PlanView, plan_of

_DRAWN = ("rank", "n_tokens", "nll", "delta_nll", "recall")  # of every cell
_CURVE = 25  # points of a fitted line
_NAME_PART = 24  # letters of a setting in a name
_LETTERS = {"alpha": "α", "beta": "β"}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A fitted parameter with its 95 % interval; an end is None where the data give none."""

    name: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class LawView:
    """A fitted law, as numbers.

    Attributes:
        form: name of its form.
        equation: the form as a line of text.
        parameters: what was fitted.
        r2: R² on the cells that aren't censored; None where it isn't defined.
        points: for each cell `rank`, `n_tokens`, `measured` and `predicted` ΔL in nats per token,
            `residual` (measured less predicted), `censored`.
        curves: the fit between the cells: `rank`, `n_tokens`, `predicted`.
        comparison: for each form a row, name to number or text.
        notes: sentences about what the data can't tell.
    """

    form: str
    equation: str
    parameters: Sequence[Parameter]
    r2: float | None
    points: Sequence[Mapping[str, Any]] = field(repr=False)
    curves: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    comparison: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class ProbeView:
    """The cells of one setting, and what was fitted to them.

    Attributes:
        name: what the page calls it.
        cells: rows, all of them finished.
        law: the memory law; None where it can't be fitted.
        plan: the law of recall, as a table; None where it can't be fitted.
    """

    name: str
    cells: Sequence[CellRow] = field(repr=False)
    law: LawView | None = None
    plan: PlanView | None = None


def probes_of(cells: Sequence[CellRow], *, name: str) -> list[ProbeView]:
    """The finished cells setting by setting, with the laws that can be fitted to them.

    Args:
        cells: rows, as `read_cells` gives them.
        name: of their source; each view's name is this and what tells its setting from the others.

    Raises:
        LawError: no cell is finished, or one lacks a number that is drawn of every cell.
    """
    done = finished_cells(cells)
    if not done:
        raise LawError(f"{name}: no finished cell among {len(cells)}. Run the probe first.")
    for cell in done:
        for column in _DRAWN:
            number(cell, column)
    groups = list(split_by_setting(done).values())
    return [
        ProbeView(name=f"{name}: {setting}", cells=own, law=law_of(own), plan=plan_of(own))
        for setting, own in zip(_names([own[0] for own in groups]), groups, strict=True)
    ]


def _names(cells: Sequence[CellRow]) -> list[str]:
    """A name for the setting of each cell: what differs among them, or else the task."""
    *columns, hashed = SETTING_COLUMNS
    told = [name for name in columns if len({str(cell.get(name)) for cell in cells}) > 1]

    def names() -> list[str]:
        parts = [[str(cell[key])[:_NAME_PART] for key in told if key in cell] for cell in cells]
        return [
            ", ".join(part) or str(cell.get("task"))
            for part, cell in zip(parts, cells, strict=True)
        ]

    if len(set(names())) < len(cells):  # nothing but the hash of the whole setting differs
        told.append(hashed)
    return names()


def law_of(cells: Sequence[CellRow]) -> LawView | None:
    """The law in the paper's form, fitted to cells of one setting; None where it can't be."""
    try:
        law = MemoryLaw().fit_cells(cells)
        forms = compare_cells(cells)
        X, y, censored, _ = cell_arrays(cells)
    except LawError:
        return None
    ranks, lengths = (np.unique(X[:, column]) for column in (0, 1))
    lines = [
        *((rank, n) for rank in ranks for n in np.geomspace(lengths[0], lengths[-1], _CURVE)),
        *((rank, n) for n in lengths for rank in np.geomspace(ranks[0], ranks[-1], _CURVE)),
    ]
    base = float(X[:, 2].mean())
    drawn = law.predict([[rank, n, base] for rank, n in lines])
    return LawView(
        form=law.form,
        equation=FORMS[law.form].equation,
        parameters=[
            Parameter(
                name=_LETTERS.get(name, name),
                value=value,
                low=law.intervals_[name][0],
                high=law.intervals_[name][1],
            )
            for name, value in law.params_.items()
        ],
        r2=law.r2_,
        points=[
            {
                "rank": int(x[0]),
                "n_tokens": int(x[1]),
                "measured": float(measured),
                "predicted": float(predicted),
                "residual": float(measured - predicted),
                "censored": bool(cut),
            }
            for x, measured, predicted, cut in zip(X, y, law.predict(X), censored, strict=True)
        ],
        curves=[
            {"rank": float(rank), "n_tokens": float(n), "predicted": float(value)}
            for (rank, n), value in zip(lines, drawn, strict=True)
        ],
        comparison=[
            {
                "form": found.form,
                "parameters": found.n_parameters,
                "R²": found.r2,
                "ΔAICc": found.delta_aicc,
                "error on the longest": _percent(found.held_out_length_error),
                "on the largest rank": _percent(found.held_out_size_error),
            }
            for found in forms
        ],
        notes=law.identifiability_.statements,
    )


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"
