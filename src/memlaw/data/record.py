"""A record: a prompt and the completion that must follow it, as text and as tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

Message = Mapping[str, str]
Prompt = str | tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One thing to remember.

    Attributes:
        prompt: a string, or the chat messages before the answer.
        completion: the text that must be recited, exactly.
        id: where the record comes from, as `file:line` or `name:number` (from 1). Unique.
    """

    prompt: Prompt
    completion: str
    id: str

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
        text = self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]
        return " ".join(text.split())


@dataclass(frozen=True, kw_only=True)
class Example:
    """A record as tokens.

    Attributes:
        record: the record.
        prompt_ids: token ids of the prompt; at least one.
        target_ids: token ids of the completion, then the end-of-turn token.
        active_from: the position from which an activated adapter is active; None: there is none.
    """

    record: Record
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    active_from: int | None = None
