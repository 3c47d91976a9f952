"""`memlaw diff`: what it takes, what it runs, what it shows."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.text import Text
from tyro.conf import Positional, arg

from memlaw.cli.dispatch import DONE
from memlaw.cli.parse import parse
from memlaw.cli.terminal import duration, print_json, print_rows, quiet_libraries, stdout_console
from memlaw.data.readers import DataFormat
from memlaw.settings.update import UpdateConfig

if TYPE_CHECKING:
    from memlaw.writer.changes import Changes

GROUPS = {
    "data": (
        *("prompt_field", "completion_field", "data_format", "delimiter", "skip_bad"),
        "paraphrases",
    ),
    "run": ("model", "json"),
}
_SHOWN = 5  # records of a kind
_WIDTH = 40


@dataclass(frozen=True, kw_only=True)
class DiffArguments:
    """Say what must change so that an adapter recites exactly DATA. Nothing is changed.

    Attributes:
        out: folder that memlaw write finished.
        data: the records that it is to recite.
        prompt_field: name of the prompt's field in the data (default: the run's).
        completion_field: name of the completion's field in the data (default: the run's).
        data_format: format of the data file; auto goes by its suffix (default: the run's).
        delimiter: what is between the cells of a CSV file (default: the run's).
        skip_bad: leave out rows that can't be used; without it, too, if the run did.
        paraphrases: file of other phrasings, where it now lies (default: the run's).
        model: a base model that must be the folder's own: its hash is compared.
        json: print JSON: counts, and the text of all records that change.
    """

    out: Annotated[Positional[Path], arg(metavar="OUT")]
    data: Annotated[Positional[Path], arg(metavar="DATA")]
    prompt_field: str | None = None
    completion_field: str | None = None
    data_format: DataFormat | None = None
    delimiter: str | None = None
    skip_bad: bool = False
    paraphrases: str | None = None
    model: str | None = None
    json: bool = False


def run(args: list[str]) -> int:
    """Run the command; returns the exit status."""
    given = parse(DiffArguments, GROUPS, "diff", args)
    quiet_libraries()
    from memlaw.cli.progress import ConsoleObserver
    from memlaw.shards.diffing import diff

    names = (*GROUPS["data"], "model")
    config = UpdateConfig(**{name: getattr(given, name) for name in names})
    with closing(ConsoleObserver()) as observer:
        found = diff(given.out, given.data, config, observer=observer)
    if given.json:
        print_json(found.to_json())
    else:
        show_changes(found)
    return DONE


def show_changes(found: Changes) -> None:
    """How many of each kind, and the first few."""
    from memlaw.data.duplicates import shortened

    console = stdout_console()

    def line(mark: str, title: str, rest: str = "") -> None:
        console.print(Text(f"  {mark} '{shortened(title, _WIDTH)}'{rest}"), soft_wrap=True)

    rows = {kind: f"{n:,}" for kind, n in found.counts.items()}
    if found.cost_s and not found.nothing:
        rows["will take about"] = duration(found.cost_s)
    print_rows(console, rows)
    for record in found.added[:_SHOWN]:
        line("+", record.title, f" -> '{shortened(record.completion, _WIDTH)}'")
    for old, new in found.replaced[:_SHOWN]:
        was, now = (shortened(r.completion, _WIDTH) for r in (old, new))
        line("~", new.title, f" -> '{now}' (was '{was}')")
    for record in found.removed[:_SHOWN]:
        line("-", record.title)
    for certified in found.lost[:_SHOWN]:
        line("?", certified.id, " of the certificate")
    shown = sum(min(_SHOWN, n) for kind, n in found.counts.items() if kind != "unchanged")
    total = sum(n for kind, n in found.counts.items() if kind != "unchanged")
    if total > shown:
        console.print(f"  and {total - shown} more")
    if found.nothing:
        console.print("NO CHANGE: these are the records that it was written with.")
    elif found.removed:
        console.print(
            "An update makes the adapter forget what is removed, and drops the generations before "
            "it, which recite it."
        )
