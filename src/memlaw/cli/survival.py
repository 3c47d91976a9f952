"""What `memlaw audit --survival` runs and shows."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from memlaw.cli.dispatch import DONE, NOT_CERTIFIED
from memlaw.cli.terminal import plain_table, print_json, stdout_console
from memlaw.settings.audit import AuditConfig

if TYPE_CHECKING:
    from memlaw.export.survive import Survival


def run_survival(data: Path, config: AuditConfig, forms: tuple[str, ...], json: bool) -> int:
    """Audit an adapter in each form; returns the exit status."""
    from memlaw.cli.progress import ConsoleObserver
    from memlaw.export.survive import survival

    with closing(ConsoleObserver()) as observer:
        found = survival(data, config, forms=forms, observer=observer)
    if json:
        print_json(found.to_json())
    else:
        show_survival(found)
    return DONE if found.recites else NOT_CERTIFIED


def show_survival(found: Survival) -> None:
    """A line a form; then why some couldn't be tried, and the verdict."""
    console = stdout_console()
    table = plain_table("form", "certified", "recited", "lowest p", "NLL", "dtype", "batch")
    for row in found.rows:
        if row.audit is None:
            table.add_row(row.form.name, "not tried", "", "", "", "", "")
            continue
        audit, n = row.audit, len(row.audit.records)
        table.add_row(
            row.form.name,
            f"{audit.n_certified:,} of {n:,}",
            f"{audit.n_recalled:,} of {n:,}",
            f"{min(r.min_p for r in audit.records):.3f}",
            f"{audit.nll_nats:.4f}",
            audit.dtype,
            f"{audit.batch_size}",
        )
    console.print(table)
    left = [row for row in found.rows if row.audit is None]
    for row in left:
        console.print(Text(f"not tried: {row.form.name}: {row.why_not}"), soft_wrap=True)
    lost = [row.form.name for row in found.rows if row.audit is not None and not row.passes]
    unmet = [row.form.name for row in left if row.named]
    tried = len(found.rows) - len(left)
    verdicts = []
    if lost:
        verdicts = [f"NOT ALL IS RECITED IN {len(lost)} OF {tried} FORMS: {', '.join(lost)}"]
    if unmet:
        verdicts.append(f"NAMED, BUT NOT TRIED, SO NOT PASSED: {', '.join(unmet)}")
    for verdict in verdicts or [f"ALL IS RECITED IN ALL {tried} FORMS THAT WERE TRIED"]:
        console.print(Text(verdict, style="bold"), soft_wrap=True)
