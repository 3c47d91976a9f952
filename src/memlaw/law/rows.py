"""Cells as flat rows: chosen, split by setting, turned into the arrays that laws are fitted to.

A row is a mapping from column to value: the settings of one trained adapter and what was measured
of it. `read_cells` gives a list of rows, and so does `memlaw probe --json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from memlaw.law.estimator import Array, LawError

CellRow = Mapping[str, Any]
Covariate = Literal["rank", "parameters"]
# What cells must have in common to be points of one law; the last column is a hash of all of it.
SETTING_COLUMNS = ("task", "recipe", "placement", "layers", "objective", "steps", "setting")
_SIZE_COLUMN = {"rank": "rank", "parameters": "n_parameters"}


def finished_cells(cells: Sequence[CellRow]) -> list[CellRow]:
    """The rows whose `status` is "success", or that have no `status`; in their order."""
    return [cell for cell in cells if cell.get("status", "success") == "success"]


def split_by_setting(cells: Sequence[CellRow]) -> dict[str, list[CellRow]]:
    """Group cells by setting: cells of one group are points of one law.

    Two cells have the same setting if they agree in all of `SETTING_COLUMNS`; a column that a row
    lacks counts as None. No row is left out: choose `finished_cells` first.

    Args:
        cells: rows of any settings.

    Returns:
        The rows of each setting, in the order they were given in. Settings are in the order in
        which they first occur. A key is the JSON list of the setting's values in the order of
        `SETTING_COLUMNS`: the same for the same setting in every call; sorted keys are in the order
        of task, then recipe, and so on. Empty if there are no cells.
    """
    groups: dict[str, list[CellRow]] = {}
    for cell in cells:
        key = json.dumps([cell.get(name) for name in SETTING_COLUMNS], default=str)
        groups.setdefault(key, []).append(cell)
    return groups


def choose_cells(cells: Sequence[CellRow], where: Mapping[str, Any] | None = None) -> list[CellRow]:
    """The finished cells that have given values, and that must all be of one setting.

    Args:
        cells: rows; those whose `status` isn't "success" are left out.
        where: column to value, as {"task": "phonebook"}; None: all cells.

    Returns:
        The cells, in their order.

    Raises:
        LawError: no cell is left, or the cells mix several tasks, models, placements, layers,
            objectives or recipes.
    """
    chosen = finished_cells(cells)
    for column, wanted in (where or {}).items():
        kept = [cell for cell in chosen if cell.get(column) == wanted]
        if chosen and not kept:
            raise LawError(f"No cell has {column} {wanted!r}; there are {_listed(chosen, column)}.")
        chosen = kept
    if not chosen:
        raise LawError(f"There is no finished cell among {len(cells)}. Run the probe first.")
    for column in SETTING_COLUMNS:
        if len({_json(cell.get(column)) for cell in chosen}) > 1:
            raise LawError(
                f"The cells mix several values of {column}: {_listed(chosen, column)}. Choose "
                f"one: --where {column}=..., or where={{{column!r}: ...}} in Python."
            )
    _require_one_data(chosen)
    return chosen


def _require_one_data(cells: Sequence[CellRow]) -> None:
    """Raise LawError where cells that should have been trained on the same data weren't."""
    seen: dict[str, Any] = {}
    for cell in cells:
        where = ", ".join(f"{name} {cell.get(name)}" for name in ("task", "n_tokens", "seed"))
        data = cell.get("data_sha256")
        if data is not None and seen.setdefault(where, data) != data:
            raise LawError(
                f"The cells of {where} were trained on different data: the file was changed, or "
                "another one has its name. Probe different data into different folders."
            )


def cell_arrays(
    cells: Sequence[CellRow], covariate: Covariate = "rank"
) -> tuple[Array, Array, Array, Array]:
    """Cells as the arrays that `MemoryLaw.fit` takes.

    Args:
        cells: rows with rank or n_parameters, n_tokens, base_nll, delta_nll, saturated, task and
            seed; all of one setting (see `choose_cells`).
        covariate: what the size is: rank, or trainable parameters.

    Returns:
        X [n, 3] float: size, n_tokens, base_nll (nats per token).
        y [n] float: delta_nll, nats per token.
        censored [n] bool: the cell is saturated.
        groups [n] str: labels of the training data (see `data_key`).

    Raises:
        LawError: as `choose_cells`; a column is missing; an unknown covariate.
    """
    if covariate not in _SIZE_COLUMN:
        raise LawError(f"covariate is {covariate!r}; it must be one of {', '.join(_SIZE_COLUMN)}.")
    chosen = choose_cells(cells)
    columns = (_SIZE_COLUMN[covariate], "n_tokens", "base_nll")
    X = np.array([[number(cell, name) for name in columns] for cell in chosen])
    y = np.array([number(cell, "delta_nll") for cell in chosen])
    censored = np.array([bool(number(cell, "saturated")) for cell in chosen])
    return X, y, censored, np.array([data_key(cell) for cell in chosen])


def data_key(cell: CellRow) -> str:
    """A label of the data that a cell was trained on: their hash, or else task, tokens and seed."""
    known = cell.get("data_sha256")
    return str(known or f"{cell.get('task')}|{cell.get('n_tokens')}|{cell.get('seed')}")


def number(cell: CellRow, column: str) -> float:
    """A column of a cell as a float.

    Raises:
        LawError: the cell has nothing there, or something that isn't a finite number.
    """
    value: Any = cell.get(column)
    try:
        if not isinstance(value, str) and math.isfinite(found := float(value)):
            return found
    except (TypeError, OverflowError):  # None, a list, a whole number of 400 digits
        pass
    where = ", ".join(f"{k} {cell.get(k)}" for k in ("task", "rank", "n_tokens", "seed"))
    has = f"no {column}" if value is None else f"{column} {value!r}, which is no number"
    raise LawError(f"The cell ({where}) has {has}: it isn't a finished probe cell.")


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _listed(cells: Sequence[CellRow], column: str) -> str:
    return ", ".join(sorted({_json(cell.get(column)) for cell in cells}))
