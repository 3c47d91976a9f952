"""`memlaw fit`: what it takes, what it runs, what it shows. Nothing here needs torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from memlaw.cli.dispatch import BAD_REQUEST, DONE
from memlaw.cli.parse import parse
from memlaw.cli.terminal import BARS, plain_table, print_json, stdout_console, warn

if TYPE_CHECKING:
    from memlaw.law.fits import GridPoint, StoreFit
    from memlaw.law.memory_law import MemoryLaw

GROUPS = {"data": ("task",), "law": ("form", "covariate"), "run": ("json",)}


@dataclass(frozen=True, kw_only=True)
class FitArguments:
    """Fit the laws of memory to the cells of a probe.

    Attributes:
        runs: folder that memlaw probe -o wrote, or file of cells that memlaw probe --json printed.
        form: equation of the memory law: paper is the published one; knee and ceiling also bend
            where nothing is left to learn.
        covariate: measure of the adapter's size: its rank, or its number of trained parameters.
        task: fit this task only (default: each task).
        json: print JSON.
    """

    runs: Annotated[Positional[Path], arg(metavar="RUNS")]
    form: Literal["paper", "power", "saturating", "knee", "capacity", "ceiling"] = "paper"
    covariate: Literal["rank", "parameters"] = "rank"
    task: str | None = None
    json: bool = False


def run(args: list[str]) -> int:
    """Run the command; returns the exit status."""
    given = parse(FitArguments, GROUPS, "fit", args)
    from memlaw.data.tasks import parse_task
    from memlaw.law.fits import fit_store
    from memlaw.law.store import read_cells

    cells = read_cells(given.runs, warn)
    task = parse_task(given.task).name if given.task else None
    fits = fit_store(cells, form=given.form, covariate=given.covariate, task=task)
    if given.json:
        print_json([fit.to_json() for fit in fits])
    else:
        show_fit(fits)
    return DONE if any(fit.law is not None for fit in fits) else BAD_REQUEST


def show_fit(fits: Sequence[StoreFit]) -> None:
    """The tables: settings side by side, then each one's forms and warnings."""
    console = stdout_console()
    laws = [fit for fit in fits if fit.law is not None]
    if laws:
        _show_parameters(console, laws)
    for fit in fits:
        console.print()
        console.print(Text(_setting_text(fit), style="bold"))
        console.print("ΔL measured (bar: share of the base model's loss), and fitted (* saturated)")
        console.print(_grid(fit))
        if fit.comparison:
            _show_forms(console, fit)
        if fit.law is not None:
            for sentence in fit.law.identifiability_.statements:
                console.print(Text(sentence), soft_wrap=True)
        if fit.recall is not None:
            size = fit.recall.params_["size_at_centre"]
            low, high = fit.recall.intervals_["size_at_centre"]
            console.print(
                f"{fit.recall.covariate} needed to certify {fit.recall.centre_tokens_:.0f} tokens: "
                f"{size:.2g} ({low:.2g} to {high:.2g}), growing as tokens to the power of "
                f"{fit.recall.params_['gamma']:.2f}"
            )
        for problem in fit.problems:
            console.print(Text(problem), soft_wrap=True)


def _show_parameters(console: Console, fits: Sequence[StoreFit]) -> None:
    """The parameters of the law, a row for each setting."""
    from memlaw.law.forms import FORMS

    law = fits[0].law
    assert law is not None
    console.print(f"{FORMS[law.form].equation}   (s: {law.covariate}; ℓ: target tokens)")
    names = list(law.params_)
    table = plain_table("", *names, "R²", "noise", "cells", "saturated")
    for fit in fits:
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


def _show_forms(console: Console, fit: StoreFit) -> None:
    """The forms of the law, compared."""
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


def _grid(fit: StoreFit) -> Table:
    lengths = sorted({point.length for point in fit.grid})
    table = plain_table("rank", *(f"{length} tokens" for length in lengths))
    for rank in sorted({point.rank for point in fit.grid}):
        row = {point.length: point for point in fit.grid if point.rank == rank}
        table.add_row(str(rank), *(_point(row[n]) if n in row else "·" for n in lengths))
    return table


def _point(point: GridPoint) -> str:
    share = min(1.0, max(0.0, point.delta_nll / point.base_nll))
    bar = BARS[round(share * (len(BARS) - 1))]
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
