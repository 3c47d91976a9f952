"""A record: a prompt and the completion that must follow it, as text and as tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memlaw.core.files import json_sha256

Message = Mapping[str, Any]
Prompt = str | tuple[Message, ...]
GIVEN = "memlaw.given"  # key of a prompt's first message: what its template is given besides
ARGUMENTS = "chat_template_kwargs"  # of these: arguments of the template, by name
CALLS = ("tool_calls", "function_call")  # of a message that calls tools instead of saying something


@dataclass(frozen=True, kw_only=True)
class Record:
    """One thing to remember.

    Attributes:
        prompt: a string, or the chat messages before the answer; see `memlaw.data.messages`.
        completion: the text that must be recited, exactly.
        id: where the record comes from, as `file:line` or `name:number` (from 1). Unique.
        held_out: other ways to ask for the completion, on which nothing may be trained: what
            generality is measured on.
    """

    prompt: Prompt
    completion: str
    id: str
    held_out: tuple[Prompt, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of prompt and completion, not of the id: what identifies the record."""
        prompt = self.prompt if isinstance(self.prompt, str) else [dict(m) for m in self.prompt]
        return hashlib.sha256(
            json.dumps([prompt, self.completion], ensure_ascii=True, sort_keys=True).encode()
        ).hexdigest()

    @property
    def title(self) -> str:
        """The prompt (of a chat, its last message) on one line, for messages and tables."""
        return " ".join(texts_of(self.prompt)[-1].split())


@dataclass(frozen=True, kw_only=True)
class Example:
    """A record as tokens.

    Attributes:
        record: the record.
        prompt_ids: token ids of the prompt; at least one.
        target_ids: token ids of the completion, then the end-of-turn token unless an audit leaves
            it out.
        active_from: the position from which an activated adapter is active; None: there is none.
    """

    record: Record
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    active_from: int | None = None


def given_of(prompt: Prompt) -> dict[str, Any]:
    """What a prompt's template is given besides messages; empty: nothing."""
    return {} if isinstance(prompt, str) else dict(prompt[0].get(GIVEN) or {})


def with_given(prompt: Prompt, given: Mapping[str, Any]) -> Prompt:
    """The same prompt, its template given this besides messages, and nothing else."""
    if isinstance(prompt, str):
        if not given:
            return prompt
        prompt = ({"role": "user", "content": prompt},)
    first = {name: value for name, value in prompt[0].items() if name != GIVEN}
    return (first | ({GIVEN: dict(given)} if given else {}), *prompt[1:])


def text_of(message: Message) -> str:
    """A message's text; of content in parts, a part a line; empty where it has only tool calls."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def prompt_sha256(prompt: Prompt) -> str:
    """Hash of a prompt; of a single message of the user's, the same as of its text."""
    if not isinstance(prompt, str):
        (first, *more) = messages = [dict(message) for message in prompt]
        alone = not more and first.keys() == {"role", "content"} and first["role"] == "user"
        if not alone:
            return json_sha256(messages)
        prompt = text_of(first)
    return json_sha256(prompt)


def texts_of(prompt: Prompt) -> list[str]:
    """The texts of a prompt's messages; of a string, itself."""
    return [prompt] if isinstance(prompt, str) else [text_of(message) for message in prompt]
