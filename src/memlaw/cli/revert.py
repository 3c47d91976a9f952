"""`memlaw revert`: what it takes, what it runs, what it shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from memlaw.cli.dispatch import DONE
from memlaw.cli.log import show_log
from memlaw.cli.parse import parse

GROUPS = {"run": ("to",)}


@dataclass(frozen=True, kw_only=True)
class RevertArguments:
    """Make a folder what it was in an earlier generation; the present one is kept.

    Attributes:
        out: folder that memlaw update has changed in place.
        to: number of the generation, as memlaw log shows it.
    """

    out: Annotated[Positional[Path], arg(metavar="OUT")]
    to: int


def run(args: list[str]) -> int:
    """Run the command; returns the exit status."""
    given = parse(RevertArguments, GROUPS, "revert", args)
    from memlaw.writer.history import revert

    show_log(revert(given.out, to=given.to))
    return DONE
