"""Settle how records' prompts are rendered: every record is checked, and what is odd is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from memlaw.core.errors import ConfigError, DataError
from memlaw.data.bad_rows import BadRows
from memlaw.data.encoding import special_ids
from memlaw.data.record import ARGUMENTS, CALLS, GIVEN, Prompt, Record, texts_of
from memlaw.data.rendering import (
    MARK,
    PromptRendering,
    Rendering,
    check_argument,
    has_clock,
    prompt_text,
    refusals,
    rendered,
    set_rendering,
)

_LEAST_FRAME = 3  # characters; a shorter text before answers may end a user's prompt, too
_CLOCKS = ("2001-02-03T04:05:06", "2032-11-28T19:47:58")  # that have nothing in common


@dataclass(frozen=True, kw_only=True)
class Settled:
    """How records' prompts are rendered, and what there is to say of it.

    Attributes:
        rendering: it goes with the tokenizer from now on.
        differs: the template's generation prompt is another than the conversation up to the answer.
        clock_asked: a prompt depends on the clock.
    """

    rendering: Rendering
    differs: bool = False
    clock_asked: bool = False

    def to_json(self) -> dict[str, Any]:
        """For certificate and `run.json`: what isn't as usual."""
        found: dict[str, Any] = {}
        if self.differs:
            found["prompt_rendering"] = self.rendering.way
        if self.rendering.arguments:
            found["template_args"] = dict(self.rendering.arguments)
        if self.clock_asked:
            found["clock"] = self.rendering.clock
        return found


def settle_rendering(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    format: Literal["chat", "plain"],
    arguments: Mapping[str, Any],
    clock: str | None,
    way: PromptRendering | None,
    bad: BadRows | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> Settled:
    """Settle how the prompts of records are rendered, and let it go with the tokenizer.

    Args:
        records: what is trained or measured.
        tokenizer: theirs.
        format: of the prompts; nothing is rendered where it is `plain`.
        arguments: of the chat template.
        clock: the time that the template is told, ISO 8601; None: now, from here on.
        way: which prompt counts; None: the conversation's, unless the template rewrites an answer
            (one with a thought in it): then the generation prompt.
        bad: takes the records that are refused, instead of an error.
        notice: is told where the prompts differ, where an answer isn't rendered as it is, and where
            prompts change with the clock.

    Raises:
        ConfigError: arguments of a template for plain prompts.
        DataError: the template refuses a record or leaves out its tools; or a prompt holds the
            template's own marks.
    """
    at = clock or datetime.now().isoformat(timespec="seconds")
    rendering = Rendering(arguments=arguments, clock=at, way=way or "conversation")
    set_rendering(tokenizer, rendering)
    if format == "plain":
        if arguments:
            raise ConfigError(
                "template_args are the chat template's, and these prompts are plain text. Leave "
                "them out, or use --prompt-format chat."
            )
        return Settled(rendering=rendering)
    asked = False
    marks = TemplateMarks(tokenizer)
    apart: list[tuple[str, str, str]] = []  # id, and both prompts, where they differ
    rewritten, changed = [], []
    hidden: dict[str, list[str]] = {}  # fields of messages that the template doesn't show
    for record in records:
        try:
            with refusals(record.id):
                marks.check(record.prompt)
                _check_arguments(tokenizer, record.prompt)
                _check_shown(tokenizer, record.prompt)
                short = rendered(tokenizer, record.prompt)
                before, mark, after = rendered(tokenizer, record.prompt, MARK).rpartition(MARK)
                before = before if mark else short
                whole = rendered(tokenizer, record.prompt, record.completion)
                asked = asked or _changes_with_clock(tokenizer, record.prompt, rendering)
                unseen = _unseen(tokenizer, record.prompt)
        except DataError as error:
            if bad is None:
                raise
            bad.add(record.id, error)
            continue
        for name in unseen:
            hidden.setdefault(name, []).append(record.id)
        if before != short:
            apart.append((record.id, short, before))
        if whole != before + record.completion + after:
            changed.append(record.id)
            if whole != before + record.completion.strip() + after:
                rewritten.append(record.id)
    if way is None and rewritten and apart:
        rendering = replace(rendering, way="generation")
        set_rendering(tokenizer, rendering)
    for said in (_told_apart(apart, rendering.way), _told_changed(changed), _told_unseen(hidden)):
        if said:
            notice(said)
    if asked:
        notice(
            f"The chat template puts the time into prompts: they change with the clock. It is told "
            f"{at}, here and in the certificate; at another time the prompts are others."
        )
    return Settled(rendering=rendering, differs=bool(apart), clock_asked=asked)


def _changes_with_clock(tokenizer: Any, prompt: Prompt, rendering: Rendering) -> bool:
    if not has_clock(tokenizer):
        return False
    found = set()
    for clock in _CLOCKS:
        set_rendering(tokenizer, replace(rendering, clock=clock))
        found.add(rendered(tokenizer, prompt))
    set_rendering(tokenizer, rendering)
    return len(found) > 1


def _told_apart(apart: Sequence[tuple[str, str, str]], way: PromptRendering) -> str:
    if not apart:
        return ""
    where, short, whole = apart[0]
    if whole.startswith(short):
        differs = f"{whole[len(short) :]!r} stands between the generation prompt and the answer"
    else:
        same = next(
            (i for i, (a, b) in enumerate(zip(short, whole, strict=False)) if a != b),
            min(len(short), len(whole)),
        )
        differs = (
            f"the generation prompt ends in {short[same:]!r}, the conversation up to the answer in "
            f"{whole[same:]!r}"
        )
    counts = {
        "conversation": "the whole conversation, up to the answer. A server that sends the "
        "generation prompt alone asks another prompt; --template-args may make it the same, "
        "--prompt-rendering generation takes that prompt",
        "generation": "the generation prompt; not for the whole conversation",
    }
    return (
        f"{where}: in the chat template {differs} ({len(apart)} record(s)). This is for "
        f"{counts[way]}."
    )


def _told_unseen(hidden: Mapping[str, Sequence[str]]) -> str:
    if not hidden:
        return ""
    where = next(iter(hidden.values()))[0]
    n = len({id for ids in hidden.values() for id in ids})
    return (
        f"{where}: the chat template doesn't show {', '.join(map(repr, hidden))} of messages "
        f"({n} record(s)), so that the model isn't told."
    )


def _told_changed(changed: Sequence[str]) -> str:
    if not changed:
        return ""
    return (
        f"{changed[0]}: the chat template changes the answer when it stands in a conversation "
        f"({len(changed)} record(s)), so that a model trained on such conversations learns another "
        "one. Here it is taken as it is."
    )


class TemplateMarks:
    """The marks that a chat template frames messages with.

    Args:
        tokenizer: has a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        try:
            text = prompt_text(tokenizer, MARK)
        except Exception:  # a template that can't do a single question frames nothing we know
            text = ""
        special = special_ids(tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        tokens = dict.fromkeys(tokenizer.decode([i]) for i in ids if i in special)
        self.tokens = [token.strip() for token in tokens if token.strip()]
        frame = text.rpartition(MARK)[2].strip()
        self.frame = frame if len(frame) >= _LEAST_FRAME else ""

    def check(self, prompt: Prompt) -> None:
        """Raise DataError if the prompt is rendered already."""
        for text in texts_of(prompt):
            found = next((token for token in self.tokens if token in text), "")
            if not found and self.frame and text.rstrip().endswith(self.frame):
                found = self.frame
            if found:
                raise DataError(
                    f"the prompt holds {found!r}, a mark of the chat template, which would be put "
                    "around it again. If the prompt is rendered already, give --prompt-format "
                    "plain; else take the mark out."
                )


def _check_shown(tokenizer: Any, prompt: Prompt) -> None:
    """Raise DataError if the template leaves out tools or tool calls."""
    if isinstance(prompt, str):
        return
    whole = rendered(tokenizer, prompt)
    given = prompt[0].get(GIVEN, {})
    without: dict[str, Prompt] = {}
    for name in set(given) - {ARGUMENTS}:  # which may say what is usual
        rest = {k: v for k, v in given.items() if k != name}
        without[name] = ({**prompt[0], GIVEN: rest}, *prompt[1:])
    for n, message in enumerate(prompt):
        for call in filter(message.get, CALLS):
            bare = {"content": ""} | {k: v for k, v in message.items() if k != call}
            without[f"{call} (message {n + 1})"] = (*prompt[:n], bare, *prompt[n + 1 :])
    for name, other in without.items():
        try:
            same = rendered(tokenizer, other) == whole
        except Exception:  # it asks for them, then
            continue
        if same:
            raise DataError(
                f"the chat template doesn't show {name}. Take them out, or use a model whose "
                "template does."
            )


# Of messages: what templates show by themselves, and what only says which message answers which.
_SHOWN = {"role", "content", GIVEN, *CALLS, "id", "tool_call_id"}


def _unseen(tokenizer: Any, prompt: Prompt) -> list[str]:
    """The fields of messages that the template doesn't show."""
    if isinstance(prompt, str):
        return []
    fields = [{k for k in m if m[k]} - _SHOWN for m in prompt]
    if not any(fields):
        return []
    whole = rendered(tokenizer, prompt)
    found = []
    for name in sorted(set().union(*fields)):
        rest = tuple({k: v for k, v in m.items() if k != name} for m in prompt)
        try:
            same = rendered(tokenizer, rest) == whole
        except Exception:  # it asks for the field, then
            continue
        if same:
            found.append(name)
    return found


def _check_arguments(tokenizer: Any, prompt: Prompt) -> None:
    """Raise DataError if a row gives its template what it doesn't take."""
    if isinstance(prompt, str):
        return
    for name in prompt[0].get(GIVEN, {}).get(ARGUMENTS, {}):
        try:
            check_argument(name, tokenizer)
        except ConfigError as error:
            raise DataError(f"{ARGUMENTS}: {error}") from error
