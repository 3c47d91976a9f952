"""`memlaw plan`: what it takes, what it runs, what it shows. Only `--verify` needs torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text
from tyro.conf import Positional, arg

from memlaw.cli.dispatch import DONE, NOT_CERTIFIED
from memlaw.cli.parse import parse
from memlaw.cli.terminal import (
    duration,
    print_json,
    print_rows,
    quiet_libraries,
    stdout_console,
    warn,
)
from memlaw.core.errors import ConfigError

if TYPE_CHECKING:
    from memlaw.law.plan import RankPlan, TokensPlan

Row = dict[str, Any]
GROUPS = {
    "data": ("task", "where"),
    "question": ("tokens", "rank", "recall", "confidence"),
    "run": ("verify", "json"),
}


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Which rank for so many tokens, or how many tokens for a rank.

    Attributes:
        runs: folder that memlaw probe -o wrote, or file of cells (default: a table measured on the
            embedded model).
        tokens: which rank stores so many target tokens (the end token of each target counts)?
        rank: how many target tokens does an adapter of this rank store?
        recall: 1: every record is to be certified; less: this share of the records is to be
            recited.
        confidence: required probability of success, above 0 and under 1.
        task: use the cells of this task (needed if RUNS holds several).
        where: use the cells with COLUMN=VALUE, as recipe=paper (needed if RUNS holds several
            settings).
        verify: also train adapters of that rank, and of half of it, on new data.
        json: print JSON.
    """

    runs: Annotated[Positional[Path | None], arg(metavar="[RUNS]")] = None
    tokens: int | None = None
    rank: int | None = None
    recall: float = 1.0
    confidence: float = 0.9
    task: str | None = None
    where: tuple[str, ...] = ()
    verify: bool = False
    json: bool = False


def run(args: list[str]) -> int:
    """Run the command; returns the exit status."""
    given = parse(PlanArguments, GROUPS, "plan", args)
    from memlaw.data.tasks import parse_task
    from memlaw.law.builtin import BUILTIN, builtin_cells
    from memlaw.law.plan import plan_rank, plan_tokens
    from memlaw.law.store import read_cells

    if (given.tokens is None) == (given.rank is None):
        raise ConfigError("plan needs either --tokens (which rank?) or --rank (how many tokens?).")
    cells = builtin_cells() if given.runs is None else read_cells(given.runs, warn)
    where = conditions(given.where)
    if given.task:
        where["task"] = parse_task(given.task).name
    how: dict[str, Any] = {
        "recall": given.recall,
        "confidence": given.confidence,
        "where": where,
    }
    plan: RankPlan | TokensPlan
    if given.tokens is not None:
        plan = plan_rank(cells, given.tokens, **how)
    else:
        assert given.rank is not None
        plan = plan_tokens(cells, given.rank, **how)
    verified = _verified(cells, plan, where, given.recall) if given.verify else []
    if given.json:
        rows = [row | {"succeeded": succeeded} for row, succeeded in verified]
        print_json(asdict(plan) | {"verified": rows})
    else:
        show_plan(plan, BUILTIN if given.runs is None else str(given.runs), verified)
    return NOT_CERTIFIED if verified and not verified[0][1] else DONE


def conditions(texts: Sequence[str]) -> dict[str, Any]:
    """Each `COLUMN=VALUE` as a column and what JSON, or else the text itself, says it is."""
    found = {}
    for text in texts:
        column, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(f"--where {text}: write COLUMN=VALUE, as recipe=paper.")
        try:
            found[column] = json.loads(value)
        except ValueError:
            found[column] = value
    return found


def _verified(
    cells: list[Row], plan: RankPlan | TokensPlan, where: dict[str, Any], recall: float
) -> list[tuple[Row, bool]]:
    """Cells trained at the answer, and at half of it, and whether each succeeded."""
    quiet_libraries()
    from memlaw.cli.progress import ConsoleObserver
    from memlaw.law.recall_law import reached
    from memlaw.probe.verify import verify_plan

    with closing(ConsoleObserver()) as observer:
        trained = verify_plan(cells, plan.rank, plan.n_tokens, where=where, observer=observer)
    return list(zip(trained, reached(trained, recall).tolist(), strict=True))


def show_plan(
    plan: RankPlan | TokensPlan, source: str, verified: Sequence[tuple[Row, bool]] = ()
) -> None:
    """The answer.

    Args:
        plan: the answer.
        source: the cells that it follows from, in words.
        verified: cells that were trained to see whether it holds, and whether each succeeded.
    """
    from memlaw.law.plan import RankPlan

    console = stdout_console()
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
        said = f"about {duration(plan.train_s)} per cell, trained and measured beside others"
        rows["training"] = f"{said}, on the probe's machine"
    rows["source"] = source
    print_rows(console, rows)
    for warning in plan.extrapolates:
        console.print(Text(f"EXTRAPOLATES: {warning}"), soft_wrap=True)
    for row, succeeded in verified:
        console.print(
            f"trained at rank {row['rank']} on {row['n_tokens']} tokens not seen before, "
            f"{row['n_steps']} steps: {row['share_under']:.1%} of tokens under the threshold: "
            f"{'succeeds' if succeeded else 'fails'}",
            soft_wrap=True,
        )
    if verified:
        hit = verified[0][1]
        console.print(Text("HIT" if hit else "MISS", style="bold"))
