"""Pieces of terminal output that all commands share."""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"


def stdout_console() -> Console:
    """Standard output, for results."""
    return Console(highlight=False)


def print_json(content: Any) -> None:
    """Results as JSON on standard output."""
    print(json.dumps(content, ensure_ascii=False, indent=2))


def warn(text: str) -> None:
    """A sentence on standard error."""
    print(f"memlaw: {text}", file=sys.stderr)


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
