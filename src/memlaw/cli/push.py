"""`memlaw push`: what it takes, what it runs, what it shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from memlaw.cli.dispatch import DONE
from memlaw.cli.parse import parse
from memlaw.cli.terminal import print_rows, quiet_libraries, stdout_console

if TYPE_CHECKING:
    from memlaw.writer.publish import Pushed

GROUPS = {"card": ("base", "license", "datasets"), "upload": ("private", "key", "dry_run")}


@dataclass(frozen=True, kw_only=True)
class PushArguments:
    """Upload an adapter, its certificate and its card to the Hugging Face hub.

    Attributes:
        folder: folder that memlaw write or PEFT wrote.
        repo: OWNER/NAME on the hub.
        base: hub id of the base model (default: what it was asked for by).
        license: of the adapter, for the card, as apache-2.0.
        datasets: hub ids of the data it was trained on, for the card.
        private: make a new repository private.
        key: sign what is uploaded with this private key (needs the extra sign).
        dry_run: only list what would be uploaded, and what stays.
    """

    folder: Annotated[Positional[Path], arg(metavar="OUT")]
    repo: Annotated[Positional[str], arg(metavar="REPO")]
    base: str | None = None
    license: str | None = None
    datasets: tuple[str, ...] = ()
    private: bool = False
    key: Path | None = None
    dry_run: bool = False


def run(args: list[str]) -> int:
    """Run the command; returns the exit status."""
    given = parse(PushArguments, GROUPS, "push", args)
    quiet_libraries()
    from memlaw.writer.publish import push

    options = dict(vars(given))
    show_push(push(options.pop("folder"), options.pop("repo"), **options))
    return DONE


def show_push(found: Pushed) -> None:
    """What went up, and what never does."""
    rows = {
        "uploaded" if found.url else "to upload": ", ".join(found.files),
        "stays here": ", ".join(found.left_out) or "nothing",
        "where": found.url or f"{found.repo} (dry run: nothing was sent)",
    }
    print_rows(stdout_console(), rows)
