"""`memlaw log`: what it takes, what it runs, what it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from memlaw.cli.dispatch import DONE
from memlaw.cli.parse import parse
from memlaw.cli.terminal import duration, plain_table, print_json, stdout_console
from memlaw.core.generations import generation_name

GROUPS = {"run": ("json",)}


@dataclass(frozen=True, kw_only=True)
class LogArguments:
    """Show the generations of a folder: records, rank, damage, seconds.

    Attributes:
        out: folder that memlaw write finished.
        json: print JSON.
    """

    out: Annotated[Positional[Path], arg(metavar="OUT")]
    json: bool = False


def run(args: list[str]) -> int:
    """Run the command; returns the exit status."""
    given = parse(LogArguments, GROUPS, "log", args)
    from memlaw.writer.history import log

    lines = log(given.out)
    if given.json:
        print_json(lines)
    else:
        show_log(lines)
    return DONE


def show_log(lines: Sequence[Mapping[str, Any]]) -> None:
    """A line a generation."""
    table = plain_table(
        "", "records", "added", "replaced", "removed", "rank", "epochs", "ΔNLL", "time", "kept"
    )
    for line in lines:
        damage, wall_s = line["damage_nats"], line["wall_s"]
        table.add_row(
            generation_name(line),
            *(f"{line[name]:,}" for name in ("records", "added", "replaced", "removed")),
            f"{line['rank']}",
            f"{line['epochs']}",
            "" if damage is None else f"{damage:+.3f}",
            "" if wall_s is None else duration(wall_s),
            "yes" if line["here"] else "no",
        )
    stdout_console().print(table)
