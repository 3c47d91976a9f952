"""How a tokenizer's chat template makes a prompt's text, in training and measuring alike.

What is trained is what the template renders for the whole conversation, up to the answer. Most
templates' generation prompt ends just there. Some put text behind it (an empty thought, a channel),
or open a thought in it that the conversation then hasn't: there the two prompts differ.

The rendering goes with the tokenizer: all that is asked of a model is rendered alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

from memlaw.core.errors import ConfigError, DataError
from memlaw.data.record import ARGUMENTS, GIVEN, Prompt, text_of

PromptRendering = Literal["conversation", "generation"]
MARK = "memlaw7mark"  # stands for any text
_ATTRIBUTE = "memlaw_rendering"  # of a tokenizer
_TAKEN = ("messages", "tools", "documents", "add_generation_prompt", "tokenize", "chat_template")


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """What a chat template is given besides messages, and which of its prompts counts.

    Attributes:
        arguments: the template's arguments by name, as `enable_thinking`.
        clock: the time that the template is told, ISO 8601 without a zone; None: the time it is.
        way: `conversation`: the prompt is what the template renders for the whole conversation, up
            to the answer; `generation`: its generation prompt.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    clock: str | None = None
    way: PromptRendering = "conversation"


def set_rendering(tokenizer: Any, rendering: Rendering) -> None:
    """From now on the tokenizer's prompts are rendered so."""
    setattr(tokenizer, _ATTRIBUTE, rendering)


def rendering_of(tokenizer: Any) -> Rendering:
    """How the tokenizer's prompts are rendered."""
    return getattr(tokenizer, _ATTRIBUTE, None) or Rendering()


def template_text(tokenizer: Any) -> str:
    """The text of the chat template; of several, all of them; empty without one."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else "\n".join(map(str, template.values()))


def parsed_arguments(given: Sequence[str], tokenizer: Any) -> dict[str, Any]:
    """A template's arguments from `NAME=VALUE`; a value is JSON, or else text.

    Raises:
        ConfigError: not in this form, or an argument that the template doesn't use.
    """
    found = named_arguments(given)
    for name in found:
        try:
            check_argument(name, tokenizer)
        except ConfigError as error:
            raise ConfigError(f"template_args '{name}': {error}") from error
    return found


def named_arguments(given: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """A template's arguments by name, whatever the template takes; see `parsed_arguments`."""
    if isinstance(given, Mapping):
        return dict(given)
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"template_args '{text}': give NAME=VALUE, as enable_thinking=false.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def check_argument(name: str, tokenizer: Any) -> None:
    """Raise ConfigError unless the chat template takes an argument of this name."""
    if not name.isidentifier() or name in _TAKEN:
        raise ConfigError(
            f"no argument of a chat template is called '{name}' ({', '.join(_TAKEN)} are given "
            "otherwise). Correct it, or leave it out."
        )
    if name not in template_text(tokenizer):
        raise ConfigError(
            f"the chat template has no argument '{name}'. Correct it, or leave it out."
        )


def rendered(tokenizer: Any, prompt: Prompt, answer: str | None = None) -> str:
    """What the chat template makes of a prompt: with its generation prompt, or with an answer.

    Args:
        tokenizer: has a chat template.
        prompt: the prompt.
        answer: the assistant's message that ends the conversation; None: the generation prompt.

    Raises:
        jinja2.TemplateError: the template refuses the conversation.
        DataError: it can't show the prompt's content.
    """
    messages, given = _parts(prompt)
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    messages = _shaped(tokenizer, messages)
    rendering = rendering_of(tokenizer)
    own = given.pop(ARGUMENTS, {})  # the row's
    given |= {"add_generation_prompt": answer is None, "clock": rendering.clock}
    given |= {**rendering.arguments, **own}
    parsed, objects = _with_parsed_calls(messages)
    if objects:
        try:
            text = _apply(tokenizer, parsed, **given)
        except Exception as error:
            if not _is_refusal(error):
                raise
            text = ""  # it asks for text
        # A template that joins texts shows an object as Python does: it asks for text, too.
        if text and not any(repr(value) in text for value in objects if value):
            return text
    return _apply(tokenizer, messages, **given)


def _with_parsed_calls(
    messages: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages whose tool calls have their arguments as objects; and those that were JSON text.

    Text is how servers send and get them, and what data sets hold; a template that turns them into
    JSON would do so twice. So servers parse them before they render, as is done here.
    """
    found: list[dict[str, Any]] = []

    def parsed(call: Any) -> Any:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
            return call
        try:
            value = json.loads(function["arguments"] or "{}")
        except ValueError:
            return call
        if not isinstance(value, dict):
            return call
        found.append(value)
        function = {**function, "arguments": value}
        return {**call, "function": function} if "function" in call else function

    changed = [
        {**m, "tool_calls": [parsed(call) for call in m["tool_calls"]]}
        if isinstance(m.get("tool_calls"), list)
        else m
        for m in messages
    ]
    return changed, found


def prompt_text(tokenizer: Any, prompt: Prompt) -> str:
    """The prompt that is trained and asked; see `Rendering.way`. Raises as `rendered` does."""
    if rendering_of(tokenizer).way == "conversation":
        before, mark, _ = rendered(tokenizer, prompt, MARK).rpartition(MARK)
        if mark:
            return before
    return rendered(tokenizer, prompt)


@contextmanager
def refusals(where: str) -> Iterator[None]:
    """Within the block, a template that refuses a conversation is a DataError at `where`."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except Exception as error:
        if not _is_refusal(error):
            raise
        raise DataError(
            f"{where}: the chat template refuses it ({error}). Change the messages, or name a "
            "tokenizer whose template takes them with --tokenizer."
        ) from error


def _is_refusal(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] == "jinja2"


def _parts(prompt: Prompt) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages, and what the template is given besides."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}], {}
    messages = [dict(message) for message in prompt]
    return messages, dict(messages[0].pop(GIVEN, {}))


def _shaped(tokenizer: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with content in the form that the template shows: a text, or parts."""
    takes_text, takes_parts = _takes(tokenizer, template_text(tokenizer))
    for n, message in enumerate(messages, 1):
        content = message.get("content")
        if isinstance(content, list) and not takes_parts:
            if len(content) > 1:
                raise DataError(
                    f"message {n} has content in {len(content)} parts, and this chat template "
                    "shows one text. Join the parts."
                )
            message["content"] = text_of(message)
        elif isinstance(content, str) and takes_parts and not takes_text:
            message["content"] = [{"type": "text", "text": content}]
    return messages


@lru_cache(maxsize=16)
def _takes(tokenizer: Any, template: str) -> tuple[bool, bool]:
    """Whether the template shows content that is a text, and content in parts."""
    found = []
    for content in (MARK, [{"type": "text", "text": MARK}]):
        try:
            text = _apply(
                tokenizer,
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
            )
        except Exception:
            text = ""
        found.append(MARK in text and f"'{MARK}'" not in text and f'"{MARK}"' not in text)
    return found[0], found[1]


# Put before a template, it tells a time that was fixed instead of the time it is. Transformers
# gives templates values, not functions: a form of the time that isn't there yet is asked for.
_ASKED = "memlaw asks for the time as "
_CLOCK = (
    "{%- macro strftime_now(form) -%}"
    "{{ times[form] if form in times else raise_exception('" + _ASKED + "' ~ form) }}"
    "{%- endmacro -%}"
)


@lru_cache(maxsize=16)
def _forms(template: str) -> set[str]:
    """The forms of the time that a template has asked for; grows as it is rendered."""
    return set()


def has_clock(tokenizer: Any) -> bool:
    """Whether the chat template can tell the time."""
    return "strftime_now" in template_text(tokenizer)


def _apply(
    tokenizer: Any, messages: list[dict[str, Any]], clock: str | None = None, **given: Any
) -> str:
    if clock is None or not has_clock(tokenizer):
        return _filled(tokenizer, messages, given)
    template = tokenizer.get_chat_template(tools=given.get("tools"))
    at, forms = datetime.fromisoformat(clock), _forms(template)
    given["chat_template"] = _CLOCK + template
    while True:
        given["times"] = {form: at.strftime(form) for form in forms}
        try:
            return _filled(tokenizer, messages, given)
        except Exception as error:
            form = str(error).partition(_ASKED)[2]
            if not form or form in forms:
                raise
            forms.add(form)


def _filled(tokenizer: Any, messages: list[dict[str, Any]], given: dict[str, Any]) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **given))
    except (TypeError, AttributeError, KeyError) as error:  # of an expression in the template
        from jinja2.exceptions import TemplateRuntimeError

        raise TemplateRuntimeError(f"{type(error).__name__}: {error}") from error
