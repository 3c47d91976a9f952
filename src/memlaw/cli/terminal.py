"""Pieces of terminal output that all commands share."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"


# What commands a terminal, or turns the order in which it shows text: all but tabs and line ends.
_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""Text for a terminal: what would command it is written out, as `\x1b`.

    Records, names of files, and a server's words come from others.
    """
    return _COMMANDS.sub(lambda found: repr(found[0])[1:-1], text)


class PlainConsole(Console):
    """A console to which text is text: no commands to the terminal in it, and no markup."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As `Console.render`, with all text made visible."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(visible(segment.text), segment.style)


def stdout_console() -> Console:
    """Standard output, for results."""
    return PlainConsole()


def print_json(content: Any) -> None:
    """Results as JSON on standard output."""
    text = json.dumps(content, ensure_ascii=False, indent=2)
    print(_COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def warn(text: str) -> None:
    """A sentence on standard error."""
    print(f"memlaw: {visible(text)}", file=sys.stderr)


def quiet_libraries() -> None:
    """Let only this program speak: no progress bars and warnings of the libraries beneath it."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def duration(seconds: float) -> str:
    """As `12 s`, `3:05` or `2:03:05`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def print_rows(console: Console, rows: dict[str, str]) -> None:
    """Names on the left, values on the right."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(table)


def plain_table(*columns: str) -> Table:
    """A table without lines: the first column to the left, the others to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    return table
