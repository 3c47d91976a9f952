"""Train at a planner's answer, and at half of it, on data that the plan hasn't seen."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memlaw.law import Cell, choose_cells
from memlaw.probe import ProbeConfig, ProbeObserver, probe


def verify_plan(
    cells: Sequence[Cell],
    rank: int,
    n_tokens: int,
    *,
    task: str | None = None,
    seed: int | None = None,
    observer: ProbeObserver | None = None,
) -> list[dict[str, Any]]:
    """Train adapters as the cells were trained, and say what they remember.

    Args:
        cells: flat dicts that a plan was read off; of one setting, but for the task.
        rank: the plan's.
        n_tokens: target tokens.
        task: where the cells are of several tasks: the one to go by.
        seed: of data, initialisation and order; default: one that no cell has.
        observer: is told of progress.

    Returns:
        Rows as `read_cells` gives them: at `rank`, and at half of it, rounded down, if that is 1
        or more.

    Raises:
        MemlawError: a child that says what was wrong with the cells, or with training.
    """
    chosen = choose_cells(cells, {"task": task} if task else None)
    like = chosen[0]
    config = ProbeConfig(
        task=like["task"],
        ranks=tuple(r for r in (rank, rank // 2) if r),
        lengths=(n_tokens,),
        seeds=(max(cell["seed"] for cell in chosen) + 1 if seed is None else seed,),
        recipe=like["recipe"],
        steps=like["steps"],
        objective=like["objective"],
        on_empty=like["on_empty"],
        learning_rate=like["learning_rate"],
        batch_size=None if like["batch_size"] == "auto" else like["batch_size"],
        retention=like["retention"],
        whiten=like["whiten"],
        placement=like["placement"],
        layers=tuple(like["layers"]),
        model=like["model"],
        dtype=like["dtype"],
        prompt_format=like["prompt_format"],
    )
    with tempfile.TemporaryDirectory(prefix="memlaw-verify-") as folder:
        rows = probe(Path(folder), config, observer=observer).cells
    return sorted(rows, key=lambda row: -row["rank"])
