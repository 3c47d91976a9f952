"""What a row's fields mean: the layouts in which people keep prompts and answers.

To add a layout, add a line to `LAYOUTS`, and one to the table in docs/data.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from memlaw.core.errors import DataError

Fields = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One meaning of fields.

    Attributes:
        fields: names that a row of this layout has; the last of them holds the completion.
        also: names that are taken, too, where they are filled.
        said: how prompt and completion are made, for a notice; empty: nothing needs to be said.
        take: what a row holds: `messages`, or `prompt` and `completion`; without a `prompt` it is
            the one that texts are recited on, and `prompts` are several.
    """

    fields: tuple[str, ...]
    also: tuple[str, ...] = ()
    said: str = ""
    take: Callable[[Fields], dict[str, Any]]

    def fits(self, names: set[str]) -> bool:
        """Its fields are there; and, but for chats, no `prompt` or `completion` is ignored."""
        ignored = set() if self.fields[0] in _CHATS else (names & _USUAL) - set(self.fields)
        return names.issuperset(self.fields) and not ignored


_USUAL = {"prompt", "completion"}
_CHATS = {"messages", "conversations", "conversation"}
# Fields that usually belong to what the model is told.
_TOLD = {
    *("system", "system_prompt", "instruction", "input", "context", "history"),
    *("image", "images", "video", "videos", "audio", "audios"),
}
_LEARNT = ("weight", "train", "training", "loss")  # of a message: trainers learn it if it is true
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}


def pair(prompt: str, completion: str, said: str = "") -> Layout:
    """The layout of two fields."""
    return Layout(
        fields=(prompt, completion),
        said=said,
        take=lambda row: {"prompt": row[prompt], "completion": row[completion]},
    )


def layout_of(row: Fields) -> Layout | None:
    """The first layout that fits the fields with a value, else all fields; None: none does."""
    with_value = {name for name, value in row.items() if value is not None}
    fitting = (
        layout for names in (with_value, set(row)) for layout in LAYOUTS if layout.fits(names)
    )
    return next(fitting, None)


def left_out(row: Fields, layout: Layout) -> list[str]:
    """Filled fields that another layout would take, or that usually belong to a prompt."""
    known = _TOLD.union(*(other.fields for other in LAYOUTS))
    taken = {*layout.fields, *layout.also}
    return [name for name, value in row.items() if name in known - taken and is_filled(value)]


def refuse_unlearnt(answer: Fields) -> None:
    """Raise DataError if a message that is to be recited has a mark that it isn't to be learnt."""
    for name in _LEARNT:
        value = answer.get(name)
        if isinstance(value, bool | int | float) and not value:
            raise DataError(
                f"the answer is marked {name}: {json.dumps(value)}, which tells trainers not to "
                "learn it. Leave the row out, or take the mark off."
            )


def is_filled(value: Any) -> bool:
    """The value isn't null, NaN, blank or an empty list, not even one in JSON."""
    if isinstance(value, str):
        return bool(value.strip(" \t\r\n[]{}"))
    return not is_missing(value) and value != []


def is_missing(value: Any) -> bool:
    """The value is null, NaN or pandas' NA, as tables hold where there is none."""
    return value is None or (value == value) is not True  # NaN and NA don't equal themselves


def _instruction(*names: str) -> Layout:
    """An instruction, perhaps more text, and an answer."""
    instruction, more, answer = names

    def take(row: Fields) -> dict[str, Any]:
        parts = [row[name] for name in (instruction, more) if is_filled(row.get(name))]
        told = "\n".join(parts) if all(isinstance(p, str) for p in parts) else row[instruction]
        before = _turns(row.get("history"))
        if is_filled(row.get("system")):
            before.insert(0, {"role": "system", "content": row["system"]})
        _refuse_tools(row)
        if not before:
            return {"prompt": told, "completion": row[answer]}
        turn = _turn(told, row[answer])
        return {"messages": [*before, *turn]}

    return Layout(
        fields=(instruction, answer),
        also=(more, "system", "history", "tools"),
        said=f"the prompt is '{instruction}', then '{more}' on a new line where it is filled; the "
        f"completion is '{answer}'",
        take=take,
    )


def _turns(history: Any) -> list[dict[str, Any]]:
    if not is_filled(history):
        return []
    if not isinstance(history, list) or any(
        not isinstance(turn, list | tuple) or len(turn) != 2 for turn in history
    ):
        raise DataError("field 'history' must be a list of [question, answer].")
    return [message for question, answer in history for message in _turn(question, answer)]


def _turn(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def _conversation(name: str) -> Layout:
    """A list of messages with `from` and `value`, or `role` and `content`."""
    return Layout(
        fields=(name,),
        also=("system", "tools"),
        said=f"the messages are '{name}', after 'system' where it is filled",
        take=lambda row: {"messages": _of_conversation(row, name)},
    )


def _of_messages(row: Fields) -> dict[str, Any]:
    said = listed(row["messages"], "messages")
    if isinstance(said, list) and any(isinstance(m, Mapping) and "from" in m for m in said):
        return {"messages": _of_conversation(row, "messages")}
    return {"messages": _after_system(row, said) if isinstance(said, list) else said}


def _of_conversation(row: Fields, name: str) -> list[dict[str, Any]]:
    _refuse_tools(row)
    said = listed(row[name], name)
    if not isinstance(said, list):
        raise DataError(f"field '{name}' must be a list of messages.")
    messages: list[Any] = []
    for n, message in enumerate(said, 1):
        if not isinstance(message, Mapping):
            raise DataError(f"message {n} needs the fields 'from' and 'value'.")
        by = str(message.get("from", message.get("role")))
        if by.lower() not in _ROLES:
            raise DataError(
                f"message {n} is from '{by}', which can't be kept: messages are from "
                f"{', '.join(_ROLES)}."
            )
        text = message.get("value", message.get("content"))
        messages.append({"role": _ROLES[by.lower()], "content": text})
        if n == len(said):
            refuse_unlearnt(message)
    return _after_system(row, messages)


def _after_system(row: Fields, messages: list[Any]) -> list[Any]:
    """Messages, after the row's own system message where it has one."""
    system = row.get("system")
    if not is_filled(system):
        return messages
    first = messages[0] if messages and isinstance(messages[0], Mapping) else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    if first.get("content") != system:
        raise DataError("field 'system' is another system message than the first. Remove one.")
    return messages


def listed(value: Any, name: str) -> Any:
    """A list as tables hold it, which is as JSON text or as a dict of columns; else the value.

    Raises:
        DataError: a text that isn't JSON.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError as error:
            raise DataError(
                f"field '{name}' is a text that isn't JSON ({error}). Where a table holds lists, "
                "write them with json.dumps; or save the records as JSONL or Parquet."
            ) from error
    if isinstance(value, Mapping) and value:
        columns = list(value.values())
        if all(isinstance(column, list) for column in columns):
            if len({len(column) for column in columns}) > 1:
                raise DataError(f"field '{name}' has columns of different lengths.")
            return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return value


def _refuse_tools(row: Fields) -> None:
    if is_filled(row.get("tools")):
        raise DataError(
            "field 'tools' can't be kept: the prompt would be another one. Leave the row out, or "
            "write the prompt as the model sees it (--prompt-format plain)."
        )


LAYOUTS = (
    Layout(
        fields=("messages", "system"),
        said="the messages are 'messages', after 'system' where it is filled",
        take=_of_messages,
    ),
    Layout(fields=("messages",), take=_of_messages),
    pair("prompt", "completion"),
    Layout(
        fields=("prompts", "completion"),
        said="each of 'prompts' asks for 'completion'; one in four, and at least one, is held "
        "out: generality is measured on it",
        take=lambda row: {"prompts": row["prompts"], "completion": row["completion"]},
    ),
    _conversation("conversations"),
    _conversation("conversation"),
    _instruction("instruction", "input", "output"),
    _instruction("instruction", "context", "response"),
    *(
        pair(*names, said=f"the prompt is '{names[0]}', the completion is '{names[1]}'")
        for names in (
            ("query", "target"),
            ("question", "matching"),
            ("question", "answer"),
            ("prompt", "response"),
            ("input", "output"),
        )
    ),
    Layout(
        fields=("text",),
        said="the completion is 'text', the prompt that of --recite-prompt",
        take=lambda row: {"completion": row["text"]},
    ),
)
