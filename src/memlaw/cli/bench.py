"""`memlaw bench objectives`: what it takes, what it runs, what it shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.text import Text
from tyro.conf import Suppress

from memlaw.cli.dispatch import DONE, INTERRUPTED, UNFORESEEN
from memlaw.cli.parse import parse, split_lists
from memlaw.cli.probe import GROUPS as PROBE_GROUPS
from memlaw.cli.probe import ProbeArguments, probed
from memlaw.cli.terminal import plain_table, print_json, quiet_libraries, stdout_console
from memlaw.core.errors import ConfigError
from memlaw.settings.choices import VARIANTS, Objective, OnEmpty

if TYPE_CHECKING:
    from memlaw.probe.bench import ObjectivesResult

GROUPS = PROBE_GROUPS | {"training": ("objectives", "recipe", "steps")}


@dataclass(frozen=True, kw_only=True)
class BenchObjectivesArguments(ProbeArguments):
    """Probe a grid once with each objective, and compare each with SFT, pair by pair.

    Attributes:
        objectives: objectives to compare: sft, which is required, memft_threshold,
            memft_threshold:sft (sft on a batch whose tokens are all learnt), memft_window,
            memft_curriculum, triage.
        seeds: random seeds of data, initialisation and record order; intervals are over seeds.
    """

    objectives: tuple[str, ...] = VARIANTS
    objective: Annotated[Objective, Suppress] = "sft"
    on_empty: Annotated[OnEmpty | None, Suppress] = None
    ranks: tuple[int, ...] = (1, 2)
    lengths: tuple[int, ...] = (132, 198, 264)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    task: str = "phonebook"


def run(args: list[str]) -> int:
    """Run the command; returns the exit status."""
    if args[:1] not in (["objectives"], ["--help"], ["-h"]):
        what = f"no benchmark '{args[0]}'" if args else "bench needs a name"
        raise ConfigError(f"{what}. There is objectives: memlaw bench objectives -o RUNS.")
    args = split_lists(args[1:] or args)
    given = parse(BenchObjectivesArguments, GROUPS, "bench objectives", args)
    quiet_libraries()
    from memlaw.probe.bench import compare_objectives

    found = probed(
        given,
        lambda config, how: compare_objectives(given.out, config, given.objectives, **how),
    )
    if found is None:
        return INTERRUPTED
    if given.json:
        print_json(found.to_json())
    else:
        show_comparison(found, given.out)
    return UNFORESEEN if found.n_failed else DONE


def show_comparison(found: ObjectivesResult, out: Path) -> None:
    """Each measure of each objective beside SFT's: at the edge of capacity, and everywhere."""
    from memlaw.probe.compare import MEASURES

    console = stdout_console()
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
            table = plain_table(name, "mean", "minus sft", "ratio to sft")
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
