"""What harm is measured with: the base model, and what an adapter on it was made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from memlaw.data.encoding import encode_prompt
from memlaw.data.record import Prompt, Record, texts_of
from memlaw.data.texts import GeneralTexts
from memlaw.model.base import BaseModel


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A base model, and the records that an adapter is to make it recite.

    Attributes:
        base: the base model, without an adapter.
        texts: to retain, and to measure damage on.
        records: what the adapter recites; at least one.
        format: how prompts become tokens.
        first_layer: the lowest decoder layer that the adapter changes; 0 where that isn't certain.
        near: a file of prompts like the records' whose answers aren't stored; None: none is given.
    """

    base: BaseModel
    texts: GeneralTexts
    records: Sequence[Record]
    format: Literal["chat", "plain"]
    first_layer: int = 0
    near: str | None = None

    def encoded(
        self, prompts: Sequence[Prompt], *, room: int
    ) -> Iterator[tuple[Prompt, tuple[int, ...]]]:
        """Prompts and their token ids; without those that can't be asked.

        Those are prompts that the chat template refuses (some have no system message), that have no
        tokens, or that leave less than `room` tokens of the model's context.
        """
        context = self.base.context_length
        for prompt in prompts:
            try:
                ids = encode_prompt(self.base.tokenizer, prompt, self.format)
            except Exception as error:
                if type(error).__module__.partition(".")[0] != "jinja2":
                    raise
                continue
            if ids and (context is None or len(ids) + room <= context):
                yield prompt, ids


def title(prompt: Prompt) -> str:
    """A prompt on one line; of a conversation, all its turns."""
    texts = texts_of(prompt)
    if not isinstance(prompt, str):
        roles = [message["role"] for message in prompt]
        texts = [t if r == "user" else f"[{r}] {t}" for r, t in zip(roles, texts, strict=True)]
    return " / ".join(" ".join(text.split()) for text in texts)
