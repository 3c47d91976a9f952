"""`memlaw fit` and `memlaw plan`: what they take, and what they print. Nothing here needs torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from memlaw.cli.terminal import duration, plain_table, print_rows
from memlaw.law.fits import GridPoint, StoreFit
from memlaw.law.memory_law import FORMS, MemoryLaw
from memlaw.law.plan import RankPlan, TokensPlan

Row = dict[str, Any]
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class FitArguments:
    """Fit the laws of memory to the cells of a probe.

    Attributes:
        runs: what memlaw probe -o wrote, or a file of cells that memlaw probe --json printed.
        form: of the memory law: paper is the published one; knee and ceiling bend where nothing is
            left to learn.
        covariate: what the size of an adapter is: its rank, or its trainable parameters.
        task: look at this task only.
        json: print JSON.
    """

    runs: Positional[Path]
    form: Literal["paper", "power", "saturating", "knee", "capacity", "ceiling"] = "paper"
    covariate: Literal["rank", "parameters"] = "rank"
    task: str | None = None
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Which rank for so many tokens, or how many tokens for a rank.

    Attributes:
        runs: what memlaw probe -o wrote, or a file of cells (default: a table measured on the
            embedded model).
        tokens: target tokens to store, the end of each target included.
        rank: of the adapter; asks how many tokens it holds.
        recall: 1 is certified; less is that share of the records recited.
        confidence: probability of success that is asked for, under 1.
        task: where the cells are of several tasks: the one to go by.
        where: where they are of several settings: COLUMN=VALUE, as recipe=paper.
        verify: train at the answer, and at half of it, on data not seen yet.
        json: print JSON.
    """

    runs: Positional[Path | None] = None
    tokens: int | None = None
    rank: int | None = None
    recall: float = 1.0
    confidence: float = 0.9
    task: str | None = None
    where: tuple[str, ...] = ()
    verify: bool = False
    json: bool = False


def show_fit(fits: Sequence[StoreFit]) -> None:
    """The tables of `memlaw fit`: settings side by side, then each one's forms and warnings."""
    console = Console(highlight=False)
    laws = [fit for fit in fits if fit.law is not None]
    if laws:
        law = laws[0].law
        assert law is not None
        console.print(f"{FORMS[law.form].equation}   (s: {law.covariate}; ℓ: target tokens)")
        names = list(law.params_)
        table = plain_table("", *names, "R²", "noise", "cells", "saturated")
        for fit in laws:
            assert fit.law is not None
            table.add_row(
                str(fit.setting["task"]),
                *(_estimate(fit.law, name) for name in names),
                f"{fit.law.r2_:.3f}",
                f"{fit.law.sigma_:.2f}",
                str(fit.n_cells),
                str(fit.n_saturated),
            )
        console.print(table)
    for fit in fits:
        console.print()
        console.print(Text(_setting_text(fit), style="bold"))
        console.print("ΔL measured, as a share of what there was, and fitted (* saturated)")
        console.print(_grid(fit))
        if fit.comparison:
            table = plain_table("form", "ΔAICc", "R²", "held-out length", "held-out size")
            for result in fit.comparison:
                table.add_row(
                    result.form,
                    f"{result.delta_aicc:.1f}",
                    f"{result.r2:.3f}",
                    _percent(result.held_out_length_error),
                    _percent(result.held_out_size_error),
                )
            console.print(table)
        if fit.law is not None:
            for sentence in fit.law.identifiability_.statements:
                console.print(Text(sentence), soft_wrap=True)
        if fit.recall is not None:
            size = fit.recall.params_["size_at_centre"]
            low, high = fit.recall.intervals_["size_at_centre"]
            console.print(
                f"certified from {fit.recall.covariate} {size:.2g} ({low:.2g} to {high:.2g}) at "
                f"{fit.recall.centre_tokens_:.0f} tokens, growing as their "
                f"{fit.recall.params_['gamma']:.2f}th power"
            )
        for problem in fit.problems:
            console.print(Text(problem), soft_wrap=True)


def _grid(fit: StoreFit) -> Table:
    lengths = sorted({point.length for point in fit.grid})
    table = plain_table("rank", *(f"{length} tokens" for length in lengths))
    for rank in sorted({point.rank for point in fit.grid}):
        row = {point.length: point for point in fit.grid if point.rank == rank}
        table.add_row(str(rank), *(_point(row[n]) if n in row else "·" for n in lengths))
    return table


def _point(point: GridPoint) -> str:
    share = min(1.0, max(0.0, point.delta_nll / point.base_nll))
    bar = _BARS[round(share * (len(_BARS) - 1))]
    fitted = "" if point.fitted is None else f" {point.fitted:.1f}"
    return f"{point.delta_nll:.1f}{'*' if point.saturated else ''} {bar}{fitted}"


def _setting_text(fit: StoreFit) -> str:
    setting = fit.setting
    layers = ", ".join(map(str, setting.get("layers") or ()))
    return (
        f"{setting['task']}: {setting.get('placement')} of layer {layers}, {setting.get('recipe')} "
        f"recipe, {setting.get('objective')}, {setting.get('steps')} steps; {fit.n_certified} of "
        f"{fit.n_cells} cells certified"
    )


def _estimate(law: MemoryLaw, name: str) -> str:
    low, high = law.intervals_[name]
    return f"{_short(law.params_[name])}\n{_short(low)} to {_short(high)}"


def _short(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def show_plan(
    plan: RankPlan | TokensPlan, source: str, verified: Sequence[tuple[Row, bool]] = ()
) -> None:
    """The answer of `memlaw plan`.

    Args:
        plan: the answer.
        source: what it was read off, in words.
        verified: cells that were trained to see whether it holds, and whether each succeeded.
    """
    console = Console(highlight=False)
    rows = {"success": plan.goal}
    if isinstance(plan, RankPlan):
        low, high = plan.rank_interval
        rows["target tokens"] = f"{plan.n_tokens:,}"
        rows["rank"] = f"{plan.rank} (smallest that succeeds, 95 %: {low} to {high})"
    else:
        low, high = plan.tokens_interval
        rows["rank"] = str(plan.rank)
        rows["target tokens"] = f"{plan.n_tokens:,} (most that succeed, 95 %: {low:,} to {high:,})"
    rows["probability"] = f"{plan.probability:.2f} ({plan.confidence:g} asked for)"
    if isinstance(plan, RankPlan) and plan.probability_at_half is not None:
        rows["at half the rank"] = f"{plan.probability_at_half:.2f}"
    rows["parameters"] = f"{plan.n_parameters:,} ({plan.adapter_mb:.2g} MB)"
    if plan.train_s is not None:
        said = f"about {duration(plan.train_s)} a cell, trained and measured beside others"
        rows["training"] = f"{said}, on the probe's machine"
    rows["source"] = source
    print_rows(console, rows)
    for warning in plan.extrapolates:
        console.print(Text(f"EXTRAPOLATES: {warning}"), soft_wrap=True)
    for row, succeeded in verified:
        console.print(
            f"trained at rank {row['rank']} on {row['n_tokens']} tokens not seen before, "
            f"{row['n_steps']} steps: {row['share_under']:.1%} of tokens under the line: "
            f"{'succeeds' if succeeded else 'fails'}",
            soft_wrap=True,
        )
    if verified:
        hit = verified[0][1]
        console.print(Text("HIT" if hit else "MISS", style="bold"))
