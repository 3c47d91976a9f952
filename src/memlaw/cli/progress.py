"""Progress on standard error, of every command that takes long."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from memlaw.cli.grid import Row, delta_nll, grid_table
from memlaw.cli.terminal import PlainConsole, duration
from memlaw.core.criterion import Criterion
from memlaw.core.observer import EpochStats, Observer, Spec

_LINE_EVERY_S = 10.0


class ConsoleObserver(Observer):
    """One line that is kept up to date on a terminal; elsewhere a line every ten seconds.

    A probe shows its grid as it fills on a terminal; elsewhere a line for each cell.
    """

    def __init__(self) -> None:
        self.console = PlainConsole(stderr=True)
        self.live = Live(console=self.console, refresh_per_second=4, transient=True)
        self.started = self.shown_at = time.monotonic()
        self.first_epoch: int | None = None
        self.last_epoch = 0
        self.ranks: tuple[int, ...] = ()
        self.lengths: tuple[int, ...] = ()
        self.n_done = self.n_to_do = 0  # cells
        self.rows: list[Row] = []
        if self.console.is_terminal:
            self.live.start()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.console.is_terminal:
            self.live.stop()

    def notice(self, text: str) -> None:
        """A sentence that stays."""
        self.console.print(Text(text))

    def progress(self, what: str, done: int, total: int) -> None:
        self._show(f"{what} {done}/{total} records")

    def epoch(self, stats: EpochStats, n_records: int, max_epochs: int) -> None:
        now = time.monotonic()
        if self.first_epoch is None or stats.epoch <= self.last_epoch:  # another training
            self.first_epoch, self.started = stats.epoch - 1, now - stats.wall_s
        self.last_epoch = stats.epoch
        pace_s = (now - self.started) / (stats.epoch - self.first_epoch)
        left_s = pace_s * (max_epochs - stats.epoch)
        line = (
            f"epoch {stats.epoch:>4}  certified {stats.n_records_over}/{n_records}  "
            f"tokens under threshold {stats.n_under:>4}  loss {stats.nll_nats:.4f}  "
            f"rank {stats.rank}  "
            f"{f'left out {stats.n_left_out}  ' if stats.n_left_out else ''}"
            f"{stats.n_tokens_run / stats.wall_s:,.0f} tokens/s  "
            f"{stats.flop / stats.wall_s / 1e9:,.0f} GFLOP/s  "
            f"{duration(now - self.started)}, at most {duration(left_s)} left"
        )
        self._show(line, always=stats.n_under == 0)

    def grid(self, config: Any, finished: Sequence[Mapping[str, Any]], n_cells: int) -> None:
        self.ranks, self.lengths = config.ranks, config.lengths
        self.rows = [dict(row) for row in finished]
        self.n_to_do = n_cells - len(finished)
        if finished:
            self.notice(f"{len(finished)} of {n_cells} cells are already in the folder.")

    def steps(self, specs: Sequence[Spec], step: int, steps: int, nll_nats: float) -> None:
        took = duration(time.monotonic() - self.started)
        lengths = ", ".join(str(n) for n in dict.fromkeys(spec.length for spec in specs))
        self._show(
            f"cells {self.n_done}/{self.n_to_do}  training {len(specs)} of length {lengths}: "
            f"step {step}/{steps}  loss {nll_nats:.3f}  {took}"
        )

    def cell(self, spec: Spec, status: str, result: Mapping[str, Any]) -> None:
        self.n_done += 1
        self.rows.append({**spec._asdict(), "status": status, **result})
        line = f"length {spec.length}, rank {spec.rank}, seed {spec.seed}: "
        if status != "success":
            self.notice(f"{line}failed ({result['error'].strip().splitlines()[-1]})")
        elif self.console.is_terminal:
            self._show(f"cells {self.n_done}/{self.n_to_do}")
        else:
            under = result["share_under"]
            self.notice(
                f"{line}loss fell by {result['delta_nll']:.2f}, {under:.1%} of tokens under "
                f"p {Criterion().line:g}"
            )

    def _show(self, line: str, *, always: bool = False) -> None:
        """How things stand; `always` prints it however short ago the last line was."""
        now = time.monotonic()
        if self.console.is_terminal:
            self.live.update(self._drawn(line))
        elif always or now - self.shown_at >= _LINE_EVERY_S:
            self.shown_at = now
            self.console.print(Text(line), soft_wrap=True)

    def _drawn(self, line: str) -> RenderableType:
        """The line, under the grid where there is one."""
        if not self.rows:
            return Text(line)
        return Group(grid_table(self.rows, self.ranks, self.lengths, delta_nll), Text(line))
