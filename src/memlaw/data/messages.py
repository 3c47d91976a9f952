"""Chat messages as people have them: checked, and kept whole for the chat template.

A message keeps all its fields (tool calls, names, content in parts); only those that are None are
left out, as Transformers leaves them out. What a row gives the template besides messages, such as
`tools`, stands in the first message under the key `GIVEN`, and so goes wherever the prompt goes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from memlaw.core.errors import DataError
from memlaw.data.layouts import is_missing, refuse_unlearnt
from memlaw.data.record import ARGUMENTS, CALLS, GIVEN, Message

ROW_FIELDS = ("tools", "documents")  # of a row: what templates are given besides messages
_ROLES = ("system", "user", "assistant", "tool")
# Of an answer: what a template may show besides its content, so that it wouldn't be recited.
_BESIDES = (
    *("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal"),
    *("audio", "images", "videos"),
)


def checked_chat(messages: Any, where: str, row: Mapping[str, Any] | None = None) -> list[Message]:
    """The messages of a chat, each whole but for fields that are None.

    Args:
        messages: a list of objects with `role` and `content`; one with `tool_calls` may do without
            `content`.
        where: the place for error messages, as `file:line`.
        row: the row that the messages stand in, for its `tools` and `documents`.

    Raises:
        DataError: not such a list, no text in a message, or parts that aren't text.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{where}: 'messages' must be a list of messages, at least one.")
    found: list[Message] = []
    for n, message in enumerate(messages, 1):
        calls = isinstance(message, Mapping) and any(message.get(name) for name in CALLS)
        needed = {"role"} if calls else {"role", "content"}
        if not isinstance(message, Mapping) or not needed <= set(message):
            raise DataError(f"{where}: message {n} needs the fields 'role' and 'content'.")
        role = message["role"]
        if not (isinstance(role, str) and role.strip()):
            raise DataError(
                f"{where}: message {n} is from {role!r:.40}. Say whose it is: 'user', 'assistant'."
            )
        if role not in _ROLES and role.lower() in _ROLES:
            raise DataError(f"{where}: message {n} is from '{role}'. Write '{role.lower()}'.")
        kept = {k: v for k, v in message.items() if v is not None}
        if not (calls and message.get("content") in (None, "")):
            kept["content"] = _checked_content(message["content"], f"messages[{n}].content", where)
        found.append(kept)
    if given := given_by(row or {}, where):
        found[0] = {**found[0], GIVEN: given}
    return found


def given_by(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a row gives its template besides messages, by name: `ROW_FIELDS` and arguments.

    Raises:
        DataError: in another form.
    """
    found: dict[str, Any] = {}
    for name in ROW_FIELDS:
        value = _of_json(row.get(name), name, where)
        if not value:
            continue
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            raise DataError(f"{where}: field '{name}' must be a list of objects.")
        found[name] = value
    arguments = _of_json(row.get(ARGUMENTS), ARGUMENTS, where)
    if isinstance(arguments, Mapping):  # tables have null for what another row has
        arguments = {name: value for name, value in arguments.items() if value is not None}
    if arguments:
        if not isinstance(arguments, Mapping):
            raise DataError(f"{where}: field '{ARGUMENTS}' must be an object.")
        found[ARGUMENTS] = arguments
    return found


def answer_of(message: Message, where: str) -> str:
    """The text of a chat's last message, which is what gets recited.

    Raises:
        DataError: it is not the assistant's, or holds more than one text.
    """
    if message["role"] != "assistant":
        raise DataError(
            f"{where}: the last message is from '{message['role']}'. It must be the assistant's: "
            "it is what gets recalled."
        )
    if more := [name for name in _BESIDES if message.get(name)]:
        raise DataError(
            f"{where}: the last message has '{more[0]}', which would not be recited: only its "
            "content is. Put it into the content as the model writes it, or end the chat with an "
            "answer that has none."
        )
    try:
        refuse_unlearnt(message)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    content = message["content"]
    if isinstance(content, str):
        return content
    if len(content) > 1:
        raise DataError(
            f"{where}: the last message's content has {len(content)} parts. Join them to one text: "
            "it is what gets recalled."
        )
    return str(content[0]["text"])


def checked_text(value: Any, field: str, where: str) -> str:
    """A text, not blank.

    Raises:
        DataError: it is not text, blank, or holds half a surrogate pair.
    """
    if not isinstance(value, str):
        kind = "empty" if is_missing(value) else f"a {type(value).__name__} ({value!r:.40})"
        is_number = isinstance(value, int | float) and not is_missing(value)
        mend = " Put it in quotes, so that no digit of it is lost." if is_number else ""
        raise DataError(f"{where}: field '{field}' is {kind}, not text.{mend}")
    if not value.strip():
        raise DataError(f"{where}: field '{field}' is empty. Fill it or remove the record.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field '{field}' holds half a surrogate pair at character {error.start}, "
            "which no tokenizer can represent. Correct the text."
        ) from error
    return value


def _checked_content(content: Any, field: str, where: str) -> Any:
    """A text, or parts of type text; the type of a part with a text alone is left out by some."""
    if not isinstance(content, list):
        return checked_text(content, field, where)
    parts = []
    for part in content:
        part = (
            {"type": "text", **part}
            if isinstance(part, Mapping) and set(part) == {"text"}
            else part
        )
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise DataError(
                f"{where}: field '{field}' is a list with a part of type {kind!r}. Only parts of "
                "type 'text' are understood: records are text."
            )
        checked_text(part.get("text"), field, where)
        parts.append(part)
    if not content:
        raise DataError(f"{where}: field '{field}' is empty. Fill it or remove the record.")
    return parts


def _of_json(value: Any, name: str, where: str) -> Any:
    """A field's value; of a text, as tables hold it, what it says in JSON."""
    if not (isinstance(value, str) and value.strip()):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"{where}: field '{name}' is not JSON ({error}).") from error
