"""What `memlaw report` takes; apart from the other commands', which import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from memlaw.report.make import Format


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Show what is remembered: one page that needs no network, or figures and tables.

    Attributes:
        paths: folders that memlaw write made, token tables or JSON of memlaw audit, a probe's
            folder; several make one page.
        out: the page to write, or for other formats the folder (default: report.html, report).
        format: html is a page; png and svg are figures, with tables as Markdown; md is the tables.
        config: a TOML file with settings by these names; what is given here wins.
    """

    paths: Positional[tuple[Path, ...]]
    out: Annotated[Path | None, arg(aliases=["-o"])] = None
    format: Format = "html"
    config: Path | None = None
