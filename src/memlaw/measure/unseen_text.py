"""Harm to unseen text: damage, measured where training has not looked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from memlaw.core.errors import DataError
from memlaw.data.texts import sha256_of, unseen_text
from memlaw.measure.answers import Answered
from memlaw.measure.damage import Damage, measure_damage, windows
from memlaw.measure.decode import decoded_text
from memlaw.measure.subject import Subject
from memlaw.model.base import BaseModel


class UnseenText:
    """Measures damage on a text.

    Args:
        base: the base model.
        text: the text.
        text_name: where it comes from.
        first_layer: the lowest decoder layer that the adapter changes.

    Attributes:
        windows: [W, S] int64: the token ids that are looked at.
    """

    name = "damage"
    bound = "max_damage"

    def __init__(self, base: BaseModel, text: str, text_name: str, first_layer: int = 0) -> None:
        self.text, self.text_name, self.first_layer = text, text_name, first_layer
        self.windows = windows(base.tokenizer, text, context=base.context_length)

    @classmethod
    def of_run(cls, subject: Subject) -> UnseenText:
        """For a run of `write`."""
        texts = subject.texts
        return cls(subject.base, texts.unseen, texts.unseen_name, subject.first_layer)

    @classmethod
    def of_claim(cls, subject: Subject, claim: Mapping[str, Any]) -> UnseenText | None:
        """For the text that a certificate names; None if that text isn't here."""
        text, name = unseen_text()
        if sha256_of(text) != claim["text_sha256"]:
            path = Path(str(claim["text"]))
            if "\0" in str(path) or not path.is_file():
                return None
            try:
                text, name = unseen_text(path)
            except DataError:
                return None
        if sha256_of(text) != claim["text_sha256"]:
            return None
        return cls(subject.base, text, name, subject.first_layer)

    @staticmethod
    def read(claim: Mapping[str, Any]) -> Damage:
        """What a certificate says.

        Raises:
            TypeError, ValueError: it isn't a damage.
        """
        return Damage.from_json(claim)

    @staticmethod
    def limit(setting: float) -> float:
        """What `high` must not be above, in nats per token."""
        return setting

    def measure(self, model: Any, adapted: Callable[[], AbstractContextManager[Any]]) -> Damage:
        """Damage of an adapter; `adapted` returns a context whose value is the model with it."""
        return measure_damage(
            model,
            adapted,
            self.windows,
            text_name=self.text_name,
            text=self.text,
            first_layer=self.first_layer,
        )

    def details(self, harm: Damage, tokenizer: Any) -> dict[str, Any]:
        """Each window's text, and what became of it."""
        return {
            "damage_by_window": [
                {
                    "text": decoded_text(tokenizer, ids),
                    "delta_nll_nats": delta,
                    "kl_nats": kl,
                }
                for ids, (delta, kl) in zip(self.windows.tolist(), harm.by_window, strict=True)
            ]
        }

    def answers(self, harm: Damage) -> tuple[Answered, ...]:
        """None: nothing is asked."""
        return ()
