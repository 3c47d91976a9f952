"""`memlaw ask`: what it takes, what it runs, what it shows."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from memlaw.cli.dispatch import DONE
from memlaw.cli.parse import parse
from memlaw.cli.terminal import quiet_libraries, visible, warn
from memlaw.core.observer import Observer
from memlaw.data.encoding import PromptFormat
from memlaw.data.messages import ROW_FIELDS
from memlaw.data.record import ARGUMENTS

GROUPS = {
    "prompt": ("system", "prompt_format", "template_args"),
    "model": ("model", "tokenizer"),
    "run": ("threshold", "max_tokens"),
}


@dataclass(frozen=True, kw_only=True)
class AskArguments:
    """Print what an adapter answers to a prompt.

    Attributes:
        adapter: folder that memlaw write or PEFT wrote.
        prompt: the prompt, or a JSON list of chat messages, or a row of data as a JSON object,
            without its answer (default: the one that a plain text is recited on).
        system: a system message before the prompt.
        model: the base model (default: the adapter's own).
        tokenizer: folder or hub id of the tokenizer (default: the adapter folder's own, else the
            base model's).
        prompt_format: chat, plain, or auto: the run's, else chat where there is a template.
        template_args: arguments of the chat template, as enable_thinking=false (default: the
            run's).
        threshold: of a folder of shards: how alike a prompt must be to the nearest record's, up to
            1, for that one's adapter to answer, else the bare model does (default: the folder's
            own).
        max_tokens: most tokens to generate (default: the longest certified record's length, else
            512).
    """

    adapter: Annotated[Positional[Path], arg(metavar="ADAPTER")]
    prompt: Annotated[Positional[str | None], arg(metavar="[PROMPT]")] = None
    system: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    prompt_format: PromptFormat = "auto"
    template_args: tuple[str, ...] | None = None
    threshold: float | None = None
    max_tokens: int | None = None


_GIVEN = {*ROW_FIELDS, ARGUMENTS}  # of a row: what tells it from a prompt that is JSON


class _Notices(Observer):
    """Sentences on standard error, and no progress: standard output is the answer's alone."""

    def notice(self, text: str) -> None:
        warn(text)


def run(args: list[str]) -> int:
    """Run the command; returns the exit status."""
    given = parse(AskArguments, GROUPS, "ask", args)
    quiet_libraries()
    from memlaw.shards.asking import ask

    settings = asdict(given)
    adapter, prompt = settings.pop("adapter"), settings.pop("prompt")
    answer = ask(adapter, _of_json(prompt) or prompt, **settings, observer=_Notices())
    sys.stdout.write(visible(answer.text) if sys.stdout.isatty() else answer.text)
    if sys.stdout.isatty() and not answer.text.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()
    if answer.likeness is not None:
        which = answer.adapter or "the bare model"
        warn(
            f"no record has this prompt; the nearest one's is alike by {answer.likeness:.2f}, so "
            f"{which} answered."
        )
    if answer.missing is not None:
        warn(
            f"this is the bare model's answer: the prompt lacks the text {answer.missing!r}, from "
            "which on the adapter is active."
        )
    if answer.on_record is False and answer.likeness is None:
        warn(
            "no record of this folder has this prompt with this answer. If one was asked for: a "
            "record's prompt is the whole of it, with its system message (--system) and its turns "
            "(a JSON list of messages)."
        )
    if not answer.finished:
        warn("cut off before the model ended its turn; raise --max-tokens.")
    return DONE


def _of_json(prompt: str | None) -> list[Any] | dict[str, Any] | None:
    """A prompt that is a JSON list of messages, or a row of data; None: it is a text."""
    if prompt is None or not prompt.lstrip().startswith(("[", "{")):
        return None
    try:
        found = json.loads(prompt)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict):
        is_row = _is_chat(found.get("messages")) or ("prompt" in found and _GIVEN & found.keys())
        return found if is_row else None
    return found if _is_chat(found) else None


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value)
