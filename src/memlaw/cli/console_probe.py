"""What `memlaw probe` shows: the grid as it fills, and the grid when it is full."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from memlaw.cli.terminal import Progress, duration, plain_table
from memlaw.core.observer import Observer, Spec
from memlaw.probe.bench import ObjectivesResult
from memlaw.probe.compare import MEASURES
from memlaw.probe.run import ProbeResult

Row = dict[str, Any]


class ConsoleProbeObserver(Progress, Observer):
    """Progress: the grid as it fills on a terminal, a line a cell elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks: tuple[int, ...] = ()
        self.lengths: tuple[int, ...] = ()
        self.n_done = self.n_to_do = 0
        self.rows: list[Row] = []

    def grid(self, config: Any, finished: Sequence[Mapping[str, Any]], n_cells: int) -> None:
        self.ranks, self.lengths = config.ranks, config.lengths
        self.rows = [dict(row) for row in finished]
        self.n_to_do = n_cells - len(finished)
        if finished:
            self.notice(f"{len(finished)} of {n_cells} cells are there already.")

    def steps(self, specs: Sequence[Spec], step: int, steps: int, nll_nats: float) -> None:
        took = duration(time.monotonic() - self.started)
        lengths = ", ".join(str(n) for n in dict.fromkeys(spec.length for spec in specs))
        line = (
            f"cells {self.n_done}/{self.n_to_do}  training {len(specs)} of length {lengths}: "
            f"step {step}/{steps}  loss {nll_nats:.3f}  {took}"
        )
        self.show(line)

    def cell(self, spec: Spec, status: str, result: Mapping[str, Any]) -> None:
        self.n_done += 1
        self.rows.append({**spec._asdict(), "status": status, **result})
        line = f"length {spec.length}, rank {spec.rank}, seed {spec.seed}: "
        if status != "success":
            self.notice(f"{line}failed ({result['error'].strip().splitlines()[-1]})")
        elif self.console.is_terminal:
            self.show(f"cells {self.n_done}/{self.n_to_do}")
        else:
            under = result["share_under"]
            self.notice(f"{line}loss fell by {result['delta_nll']:.2f}, {under:.1%} under p 0.55")

    def drawn(self, line: str) -> RenderableType:
        if not self.rows:
            return super().drawn(line)
        return Group(_grid(self.rows, self.ranks, self.lengths, _delta_nll), Text(line))


def show_probe(result: ProbeResult, out: Path) -> None:
    """The tables of `memlaw probe`."""
    console = Console(highlight=False)
    done = [row for row in result.cells if row["status"] == "success"]
    ranks = sorted({row["rank"] for row in result.cells})
    lengths = sorted({row["length"] for row in result.cells})
    if done:
        n_seeds = len({row["seed"] for row in done})
        console.print(f"loss fell by, nats a token (mean of {n_seeds} seed(s); * saturated)")
        console.print(_grid(done, ranks, lengths, _delta_nll))
        console.print("tokens at p 0.55 or more, teacher-forced; ✓ all of every seed")
        console.print(_grid(done, ranks, lengths, _share_over))
        worst = max(done, key=lambda row: row["damage_nll"])
        console.print(
            f"ΔNLL on unseen text: at most {worst['damage_nll']:+.3f} nats a token (length "
            f"{worst['length']}, rank {worst['rank']}, seed {worst['seed']})"
        )
    console.print(
        f"{len(done)} of {len(result.cells)} cells, {result.n_run} of them run now, in "
        f"{duration(result.wall_s)}: {out}"
    )
    if result.n_failed:
        console.print(
            f"{result.n_failed} FAILED; their files in {out}/cells say why. The same command "
            "tries them again."
        )


def show_comparison(found: ObjectivesResult, out: Path) -> None:
    """The tables of `memlaw bench objectives`."""
    console = Console(highlight=False)
    for title, comparisons in (
        ("where SFT recalls 5 to 95 %", found.at_the_edge),
        ("on all cells", found.everywhere),
    ):
        if not comparisons:
            console.print(f"{title}: nothing to compare")
            continue
        first = comparisons[0]
        cells = ", ".join(f"{length} at rank {rank}" for _, length, rank in first.cells)
        console.print(Text(f"{title} ({cells}); {first.n_seeds} seeds; 95 % intervals"))
        for name in MEASURES:
            table = plain_table(name, "mean", "− sft's", "/ sft's")
            table.add_row("sft", f"{first.measures[name].baseline_mean:.3g}", "", "")
            for comparison in comparisons:
                of = comparison.measures[name]
                table.add_row(
                    comparison.objective,
                    f"{of.mean:.3g}",
                    interval(of.difference, of.low, of.high, "+.3g"),
                    "–" if of.ratio is None else interval(of.ratio, of.ratio_low, of.ratio_high),
                )
            console.print(table)
    console.print(Text(f"cells: {out}"))
    if found.n_failed:
        console.print(Text(f"{found.n_failed} cells FAILED; their files in {out}/cells say why."))


def interval(value: float, low: float | None, high: float | None, form: str = ".3g") -> str:
    """`value (low to high)`, or the value alone where there is no interval."""
    if low is None or high is None:
        return f"{value:{form}}"
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def _grid(
    rows: Sequence[Row],
    ranks: Sequence[int],
    lengths: Sequence[int],
    show: Callable[[list[Row]], str],
) -> Table:
    table = plain_table("rank \\ length", *map(str, lengths))
    for rank in ranks:
        cells = [
            [row for row in rows if (row["rank"], row["length"]) == (rank, length)]
            for length in lengths
        ]
        table.add_row(str(rank), *(show(cell) if cell else "·" for cell in cells))
    return table


def _delta_nll(cell: list[Row]) -> str:
    if any(row["status"] != "success" for row in cell):
        return "failed"
    mean = sum(row["delta_nll"] for row in cell) / len(cell)
    return f"{mean:.2f}{'*' if any(row['saturated'] for row in cell) else ''}"


def _share_over(cell: list[Row]) -> str:
    if all(row["certified"] for row in cell):
        return "✓"
    # Never rounded up to a whole: 100 % would be a claim.
    share = 1 - sum(row["share_under"] for row in cell) / len(cell)
    return f"{int(share * 1000) / 10:.1f}%"
