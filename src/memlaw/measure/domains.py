"""Harm in other domains than documentation: damage on prose, and on chats in the template.

Nothing is trained on these texts; the base model's part is computed once and kept on disk.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

from memlaw.core.files import json_sha256
from memlaw.core.intervals import mean_interval
from memlaw.data.everyday import everyday
from memlaw.data.texts import prose_text
from memlaw.measure.answers import Answered
from memlaw.measure.compare import Comparison, Ids
from memlaw.measure.damage import Damage, windows
from memlaw.measure.decode import decoded_text
from memlaw.measure.own_prompts import ANSWER_TOKENS, measured_prompts, sampled_answers
from memlaw.measure.subject import Subject

_N_CHATS = 64
_SEED = 990_002


class ProseDamage(Damage):
    """Damage on prose."""

    domain: ClassVar[str] = "prose"


class ChatsDamage(Damage):
    """Damage on answers to prompts in the chat template."""

    domain: ClassVar[str] = "chats"


class _Domain(ABC):
    """Measures damage on given texts.

    Args:
        subject: the base model.
    """

    name: str
    kind: type[Damage]
    text_name: str
    bound = "max_damage"

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @abstractmethod
    def texts(self) -> list[tuple[Ids, Ids]]:
        """Of each text the tokens that are given, and those that are predicted."""

    @functools.cached_property
    def comparison(self) -> Comparison:
        """Along the texts."""
        return Comparison(self.subject.base, self.texts(), self.subject.first_layer)

    @property
    def text_sha256(self) -> str:
        """Hash of the texts' tokens."""
        return json_sha256([[e.prompt_ids, e.target_ids] for e in self.comparison.examples])

    @classmethod
    def of_run(cls, subject: Subject) -> Self:
        """For an adapter that is to recite the subject's records."""
        return cls(subject)

    @classmethod
    def of_claim(cls, subject: Subject, claim: Mapping[str, Any]) -> Self | None:
        """For what a certificate says; None if it was measured on other texts."""
        here = cls(subject)
        return here if here.text_sha256 == claim["text_sha256"] else None

    @staticmethod
    def limit(setting: float) -> float:
        """What `high` must not be above, in nats per token."""
        return setting

    @classmethod
    def read(cls, claim: Mapping[str, Any]) -> Damage:
        """What a certificate says; raises TypeError or ValueError if it isn't a damage."""
        return cls.kind.from_json(claim)

    def measure(self, model: Any, adapted: Callable[[], AbstractContextManager[Any]]) -> Damage:
        """Damage of an adapter; `adapted` returns a context whose value is the model with it."""
        changes = self.comparison.of(adapted)
        delta, kl = [c.nll - c.base_nll for c in changes], [c.kl for c in changes]
        n = len(changes)
        return self.kind(
            delta_nll_nats=sum(delta) / n,
            delta_nll_ci95=mean_interval(delta),
            kl_nats=sum(kl) / n,
            kl_ci95=mean_interval(kl),
            base_nll_nats=sum(c.base_nll for c in changes) / n,
            n_windows=n,
            n_tokens=sum(c.n_tokens for c in changes),
            text=self.text_name,
            text_sha256=self.text_sha256,
            by_window=tuple(zip(delta, kl, strict=True)),
        )

    def details(self, harm: Damage, tokenizer: Any) -> dict[str, Any]:
        """Each text, and what became of it."""
        return {
            f"{self.name}_by_window": [
                {"text": decoded_text(tokenizer, e.target_ids), "delta_nll_nats": d, "kl_nats": kl}
                for e, (d, kl) in zip(self.comparison.examples, harm.by_window, strict=True)
            ]
        }

    def answers(self, harm: Damage) -> tuple[Answered, ...]:
        """None: nothing is asked."""
        return ()


class Prose(_Domain):
    """Measures damage on a novel."""

    name, kind = "prose", ProseDamage
    text_name = prose_text()[1]

    def texts(self) -> list[tuple[Ids, Ids]]:
        """Windows of it: the first token is given."""
        base = self.subject.base
        found = windows(
            base.tokenizer, prose_text()[0], context=base.context_length, name="the prose"
        )
        return [(tuple(row[:1]), tuple(row[1:])) for row in found.tolist()]


class Chats(_Domain):
    """Measures damage on answers that the base model gives, sampled, to prompts of its own.

    Only answers are predicted, at most 32 tokens of each. Without a chat template the prompts are
    bare text. A model that writes too few prompts of its own is asked everyday questions, too.
    """

    name, kind = "chats", ChatsDamage
    text_name = "the base model's own chats"

    @classmethod
    def of_claim(cls, subject: Subject, claim: Mapping[str, Any]) -> Self:
        """For a certificate: chats of this machine, which rounding may have made others."""
        return cls(subject)

    def texts(self) -> list[tuple[Ids, Ids]]:
        """Prompts and answers."""
        subject = self.subject
        own = measured_prompts(subject.base, format=subject.format)[:_N_CHATS]
        encoded = [*subject.encoded([*own, *everyday()], room=ANSWER_TOKENS)][:_N_CHATS]
        prompts = [prompt for prompt, _ in encoded]
        answers = sampled_answers(subject.base, prompts, format=subject.format, seed=_SEED)
        return [(ids, answer) for (_, ids), answer in zip(encoded, answers, strict=True)]
