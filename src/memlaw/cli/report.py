"""`memlaw report`: what it takes, what it runs, what it shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from memlaw.cli.dispatch import DONE
from memlaw.cli.parse import parse

GROUPS = {"run": ("out", "format", "config")}


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Show all that was measured: one page that needs no network, or figures and tables.

    Attributes:
        paths: folders that memlaw write made, token tables or JSON of memlaw audit, a probe's
            folder; several make one page.
        out: file for the page, or folder for the other formats (default: report.html, report).
        format: html is a page; png and svg are figures, with tables as Markdown; md is the tables.
        config: TOML file with options by these names; options on the command line win.
    """

    paths: Annotated[Positional[tuple[Path, ...]], arg(metavar="PATH ...")]
    out: Annotated[Path | None, arg(aliases=["-o"])] = None
    format: Literal["html", "png", "svg", "md"] = "html"
    config: Path | None = None


def run(args: list[str]) -> int:
    """Run the command; returns the exit status."""
    given = parse(ReportArguments, GROUPS, "report", args)
    from memlaw.report import make_report

    out = given.out or Path("report.html" if given.format == "html" else "report")
    for path in make_report(given.paths, out, format=given.format):
        print(path)
    return DONE
