"""`memlaw update`: what it takes, what it runs, what it shows."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from memlaw.cli.diff import show_changes
from memlaw.cli.dispatch import DONE, INTERRUPTED, NOT_CERTIFIED
from memlaw.cli.parse import parse, part_of
from memlaw.cli.terminal import quiet_libraries, stdout_console
from memlaw.cli.write import show_write
from memlaw.settings.update import UpdateConfig

if TYPE_CHECKING:
    from memlaw.writer.updating import UpdateResult

GROUPS = {
    "data": ("new", "keep", "near", "paraphrases", "prompt_field", "completion_field"),
    "model": ("model", "device"),
    "training": ("forget", "max_epochs"),
    "harm": ("max_damage", "min_specificity"),
    "run": ("config",),
}


@dataclass(frozen=True, kw_only=True)
class UpdateArguments(UpdateConfig):
    """Change a folder's adapter so that it recites exactly DATA, and certify all of it.

    Attributes:
        out: folder that memlaw write finished.
        data: the records that it is to recite.
        new: folder to create for the result, the other one staying as it is (default: in place,
            at once when all is certified, or not at all).
        config: TOML file with options by these names; options on the command line win.
    """

    out: Annotated[Positional[Path], arg(metavar="OUT")]
    data: Annotated[Positional[Path], arg(metavar="DATA")]
    new: Annotated[Path | None, arg(aliases=["-o"])] = None
    config: Path | None = None


def run(args: list[str]) -> int:
    """Run the command; returns the exit status."""
    given = parse(UpdateArguments, GROUPS, "update", args)
    quiet_libraries()
    from memlaw.cli.progress import ConsoleObserver
    from memlaw.core.folders import restore
    from memlaw.shards.layout import is_sharded
    from memlaw.writer.updating import update

    config = part_of(UpdateConfig, given)
    restore(given.out)  # before it is seen what it holds
    if is_sharded(given.out):
        from memlaw.cli.shards import run_update

        return run_update(given, config)
    with closing(ConsoleObserver()) as observer:
        try:
            result = update(given.out, given.data, config, new=given.new, observer=observer)
        except KeyboardInterrupt:
            observer.notice(f"Interrupted. {given.out} is as it was; the same command begins anew.")
            return INTERRUPTED
    show_update(result, given.out)
    return DONE if result.succeeded else NOT_CERTIFIED


def show_update(result: UpdateResult, out: Path) -> None:
    """What was to change, what was made, and whether it was taken."""
    show_changes(result.changes)
    if result.written is None:
        return
    show_write(result.written, to_continue="")
    if result.forgotten:
        from memlaw.cli.verdicts import show_forgotten

        show_forgotten(result.forgotten)
    if not result.taken:
        stdout_console().print(f"REFUSED: {out} is as it was.", soft_wrap=True)
