"""Train at a planner's answer, and at half of it, on data that the plan hasn't seen."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memlaw.core.observer import Observer
from memlaw.law.estimator import LawError
from memlaw.law.rows import CellRow, choose_cells, number
from memlaw.probe.run import probe
from memlaw.settings.probe import ProbeConfig

# What trains a cell like another; a file of cells may lack some of it.
_NEEDED = (
    *("task", "recipe", "objective", "asked", "placement", "layers"),
    *("model", "dtype", "device", "decode", "prompt_format", "setting"),
)


def verify_plan(
    cells: Sequence[CellRow],
    rank: int,
    n_tokens: int,
    *,
    where: Mapping[str, Any] | None = None,
    seed: int | None = None,
    observer: Observer | None = None,
) -> list[dict[str, Any]]:
    """Train adapters as the cells were trained, and say what they remember.

    Args:
        cells: flat dicts that a plan was read off; of one setting, but for the task.
        rank: the plan's.
        n_tokens: target tokens.
        where: where the cells are of several settings: column to value, as {"task": "phonebook"}.
        seed: of data, initialisation and order; default: one that no cell has.
        observer: is told of progress.

    Returns:
        Rows as `read_cells` gives them: at `rank`, and at half of it, rounded down, if that is 1
        or more.

    Raises:
        LawError: the cells don't say how they were trained, or training fails or differs.
        MemlawError: another child that says what was wrong.
    """
    chosen = choose_cells(cells, where)
    like = chosen[0]
    if missing := [name for name in _NEEDED if like.get(name) is None]:
        raise LawError(
            f"the cells don't say how they were trained ({', '.join(missing)}): they are no "
            "probe's. Give what 'memlaw probe' wrote."
        )
    if str(like["task"]).startswith(("text:", "records:")):
        raise LawError(
            f"a plan for {like['task']} can't be verified: there is no data of its kind that the "
            "plan hasn't seen. Write your data instead."
        )
    config = ProbeConfig(
        task=like["task"],
        ranks=tuple(r for r in (rank, rank // 2) if r),
        lengths=(n_tokens,),
        seeds=(max(int(number(cell, "seed")) for cell in chosen) + 1 if seed is None else seed,),
        recipe=like["recipe"],
        steps=like.get("steps"),
        objective=like["objective"],
        **like["asked"],
        **(like.get("texts") or {}),
        placement=like["placement"],
        layers=tuple(like["layers"]),
        model=like["model"],
        tokenizer=like.get("tokenizer"),
        dtype=like["dtype"],
        device=like["device"],
        decode=like["decode"],
        prompt_format=like["prompt_format"],
    )
    with tempfile.TemporaryDirectory(prefix="memlaw-verify-") as folder:
        rows = probe(Path(folder), config, observer=observer).cells
    for row in rows:
        if row["status"] != "success":
            raise LawError(f"training at rank {row['rank']} failed: {row['error']}")
        if row["setting"] != like["setting"]:
            raise LawError(
                "cells can't be trained here as the plan's were: model, texts or versions of "
                "Python differ. Probe anew on this machine."
            )
    return sorted(rows, key=lambda row: -row["rank"])
