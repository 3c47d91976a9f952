"""`memlaw ask`: what it takes, what it runs, what it shows."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from memlaw.cli.dispatch import DONE
from memlaw.cli.parse import parse
from memlaw.cli.terminal import quiet_libraries, warn
from memlaw.core.observer import Observer

GROUPS = {"model": ("model", "tokenizer"), "run": ("max_tokens",)}


@dataclass(frozen=True, kw_only=True)
class AskArguments:
    """Print what an adapter answers to a prompt.

    Attributes:
        adapter: folder that memlaw write or PEFT wrote.
        prompt: the prompt (default: the one that a plain text is recited on).
        model: the base model (default: the adapter's own).
        tokenizer: folder or hub id of the tokenizer (default: the adapter folder's own, else the
            base model's).
        max_tokens: most tokens to generate (default: the longest certified record's length, else
            512).
    """

    adapter: Annotated[Positional[Path], arg(metavar="ADAPTER")]
    prompt: Annotated[Positional[str | None], arg(metavar="[PROMPT]")] = None
    model: str | None = None
    tokenizer: str | None = None
    max_tokens: int | None = None


class _Notices(Observer):
    """Sentences on standard error, and no progress: standard output is the answer's alone."""

    def notice(self, text: str) -> None:
        warn(text)


def run(args: list[str]) -> int:
    """Run the command; returns the exit status."""
    given = parse(AskArguments, GROUPS, "ask", args)
    quiet_libraries()
    from memlaw.measure.session import ask

    answer = ask(**asdict(given), observer=_Notices())
    sys.stdout.write(answer.text)
    if sys.stdout.isatty() and not answer.text.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()
    if answer.missing is not None:
        warn(
            f"this is the bare model's answer: the prompt lacks the text {answer.missing!r}, from "
            "which on the adapter is active."
        )
    if not answer.finished:
        warn("cut off before the model ended its turn; raise --max-tokens.")
    return DONE
