"""Pieces of terminal output that all commands share."""

from __future__ import annotations

import time

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

_LINE_EVERY_S = 10.0


class Progress:
    """Progress on standard error: live on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.live = Live(console=self.console, refresh_per_second=4, transient=True)
        self.started = self.shown_at = time.monotonic()
        if self.console.is_terminal:
            self.live.start()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.console.is_terminal:
            self.live.stop()

    def notice(self, text: str) -> None:
        """A sentence that stays."""
        self.console.print(Text(text))

    def show(self, line: str, *, always: bool = False) -> None:
        """How things stand; `always` prints it however short ago the last line was."""
        now = time.monotonic()
        if self.console.is_terminal:
            self.live.update(self.drawn(line))
        elif always or now - self.shown_at >= _LINE_EVERY_S:
            self.shown_at = now
            self.console.print(Text(line), soft_wrap=True)

    def drawn(self, line: str) -> RenderableType:
        """What a terminal shows of how things stand."""
        return Text(line)


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
