"""Harm to unseen text: damage, measured where training has not looked."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from memlaw.core.errors import DataError
from memlaw.core.files import json_sha256
from memlaw.data.texts import sha256_of, unseen_text
from memlaw.measure.answers import Answered
from memlaw.measure.damage import Damage, bare_states, measure_damage, windows
from memlaw.measure.decode import decoded_text
from memlaw.measure.subject import Subject
from memlaw.model.base import BaseModel
from memlaw.model.cache import Kept, kept
from memlaw.model.provenance import versions


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
        self.base, self.first_layer = base, first_layer
        self.text, self.text_name = text, text_name
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
            known=self.known,
        )

    @functools.cached_property
    def known(self) -> dict[str, Tensor]:
        """What the bare model computes on the windows; of the built-in text it is kept on disk.

        Of other texts it isn't: from such states a text can be told.
        """
        model = self.base.model

        def make() -> Kept:
            return Kept(None, bare_states(model, self.windows, self.first_layer))

        if self.text != unseen_text()[0]:
            return make().tensors
        config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
        settings = {
            "windows": json_sha256(self.windows.tolist()),
            "first_layer": self.first_layer,
            "config": json_sha256(json.dumps(config, default=str)),
            "transformers": versions()["transformers"],
        }
        return kept(self.base, "unseen-text", settings, make).tensors

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
