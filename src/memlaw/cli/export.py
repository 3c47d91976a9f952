"""`memlaw export`: what it takes, what it runs, what it shows."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.text import Text
from tyro.conf import Positional, arg

from memlaw.cli.dispatch import DONE, NOT_CERTIFIED
from memlaw.cli.parse import parse, part_of
from memlaw.cli.terminal import print_rows, quiet_libraries, stdout_console
from memlaw.settings.export import ExportConfig

if TYPE_CHECKING:
    from memlaw.export.run import Exported
    from memlaw.measure.examine import Audit

GROUPS = {
    "export": ("out", "to", "save_dtype", "gguf_type"),
    "data": ("prompt_field", "completion_field"),
    "model": ("model", "device", "dtype"),
    "run": ("config",),
}


@dataclass(frozen=True, kw_only=True)
class ExportArguments(ExportConfig):
    """Write an adapter in the form in which others run it, and audit it again in that form.

    Attributes:
        adapter: folder that memlaw write or PEFT wrote.
        data: the records it recites.
        out: folder to create.
        config: TOML file with options by these names; options on the command line win.
    """

    adapter: Annotated[Positional[Path], arg(metavar="OUT")]
    data: Annotated[Positional[Path], arg(metavar="DATA")]
    out: Annotated[Path, arg(aliases=["-o"])]
    config: Path | None = None


def run(args: list[str]) -> int:
    """Run the command; returns the exit status."""
    given = parse(ExportArguments, GROUPS, "export", args)
    quiet_libraries()
    from memlaw.cli.progress import ConsoleObserver
    from memlaw.export.run import export

    config = part_of(ExportConfig, given)
    with closing(ConsoleObserver()) as observer:
        found = export(given.adapter, given.out, given.data, config, observer=observer)
    show_export(found)
    return DONE if found.recites else NOT_CERTIFIED


def show_export(found: Exported) -> None:
    """The adapter and the export, side by side."""
    from memlaw.cli.verdicts import print_failures

    console = stdout_console()
    before, after = _figures(found.before), _figures(found.after)
    rows = {name: f"{before[name]}, exported {after[name]}" for name in before}
    print_rows(console, rows | {"folder": str(found.out)})
    print_failures(console, found.after)
    lost = found.before.n_certified - found.after.n_certified
    if not found.recites:
        verdict = "THE EXPORT NO LONGER RECITES WHAT THE ADAPTER DOES"
    elif lost > 0:
        verdict = f"THE EXPORT RECITES ALL THAT THE ADAPTER DOES, {lost} OF IT UNDER THE LINE"
    else:
        verdict = "THE EXPORT RECITES ALL THAT THE ADAPTER DOES"
    console.print(Text(verdict, style="bold"))


def _figures(audit: Audit) -> dict[str, str]:
    n = len(audit.records)
    return {
        "certified": f"{audit.n_certified:,} of {n:,}",
        "recited word for word": f"{audit.n_recalled:,} of {n:,}",
        "lowest p": f"{min(r.min_p for r in audit.records):.3f}",
        "NLL, nats per token": f"{audit.nll_nats:.4f}",
        "computed in": audit.dtype,
    }
