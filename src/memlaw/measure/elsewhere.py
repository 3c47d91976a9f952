"""Harm elsewhere: are other prompts answered as before?

Each prompt's greedy answer by the base model is known. One pass of the adapted model along it tells
whether greedy decoding would still give it (every token is the argmax), and how far the predictions
have moved. The bare model's pass along its own answers, which it decoded in other batches, tells
what rounding alone changes: the *floor*.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from memlaw.core.files import json_sha256
from memlaw.core.intervals import mean_interval
from memlaw.data.encoding import end_of_turn_id
from memlaw.data.everyday import everyday
from memlaw.data.form import Form
from memlaw.measure.answers import Answered, answer_text, decoded
from memlaw.measure.compare import Comparison
from memlaw.measure.own_prompts import ANSWER_TOKENS, greedy_answers, measured_prompts
from memlaw.measure.subject import Subject, title
from memlaw.measure.unchanged import OVERTURNED_NATS, Unchanged

_SHOWN = 64


class Elsewhere:
    """Measures how many other prompts are answered as before.

    Args:
        subject: the base model and the records.
    """

    name = "elsewhere"
    bound = "min_specificity"

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.form = Form([record.completion for record in subject.records])

    @classmethod
    def of_run(cls, subject: Subject) -> Elsewhere:
        """For a run of `write`."""
        return cls(subject)

    @classmethod
    def of_claim(cls, subject: Subject, claim: Mapping[str, Any]) -> Elsewhere:
        """For a certificate: prompts of this machine, which rounding may have made others."""
        return cls(subject)

    @staticmethod
    def limit(setting: float) -> float:
        """What `high` must not be above."""
        return 1 - setting

    @staticmethod
    def read(claim: Mapping[str, Any]) -> Unchanged:
        """What a certificate says; raises TypeError or ValueError if it can't be."""
        return Unchanged.from_json(claim)

    @functools.cached_property
    def asked(self) -> list[tuple[Any, tuple[int, ...]]]:
        """The prompts and their token ids, everyday questions first."""
        subject = self.subject
        own = measured_prompts(subject.base, format=subject.format)
        return [*subject.encoded([*everyday(), *own], room=ANSWER_TOKENS)]

    @functools.cached_property
    def base_answers(self) -> list[tuple[int, ...]]:
        """The base model's."""
        subject, prompts = self.subject, [prompt for prompt, _ in self.asked]
        return greedy_answers(subject.base, prompts, format=subject.format)

    @functools.cached_property
    def comparison(self) -> Comparison:
        """Along the base model's answers."""
        texts = [(ids, then) for (_, ids), then in zip(self.asked, self.base_answers, strict=True)]
        return Comparison(self.subject.base, texts, self.subject.first_layer)

    def measure(self, model: Any, adapted: Callable[[], AbstractContextManager[Any]]) -> Unchanged:
        """Of an adapter; `adapted` returns a context whose value is the model with it."""
        everyday_n = sum(not isinstance(prompt, str) for prompt, _ in self.asked)
        changes = self.comparison.of(adapted)
        kl = [change.kl for change in changes]
        worst = sorted((i for i, c in enumerate(changes) if not c.greedy), key=lambda i: -kl[i])
        shown = {*[i for i in worst if i < everyday_n], *worst[:_SHOWN]}
        picked = [i for i in worst if i in shown]
        tokenizer = self.subject.base.tokenizer
        now = decoded(
            adapted,
            [self.asked[i][1] for i in picked],
            end_id=end_of_turn_id(tokenizer, self.subject.format),
            max_tokens=ANSWER_TOKENS,
        )
        changed, in_form = [], 0
        for i, ids in zip(picked, now, strict=True):
            before, after = (answer_text(tokenizer, a) for a in (self.base_answers[i], ids))
            like = self.form.fits(after) and not self.form.fits(before)
            in_form += like and i < everyday_n
            if after != before:
                changed.append(
                    Answered(
                        prompt=title(self.asked[i][0]),
                        before=before,
                        after=after,
                        kind="like a record" if like else "changed",
                        kl_nats=kl[i],
                    )
                )
        return Unchanged(
            n=len(changes),
            n_everyday=everyday_n,
            unchanged=sum(c.greedy for c in changes),
            everyday_unchanged=sum(c.greedy for c in changes[:everyday_n]),
            floor=max(1, sum(c.base_greedy for c in changes)),
            everyday_in_form=in_form,
            kl_nats=sum(kl) / len(kl),
            kl_ci95=mean_interval(kl),
            kl_worst_nats=max(kl),
            prompts_sha256=json_sha256([ids for _, ids in self.asked]),
            overturned=sum(c.lost_nats > OVERTURNED_NATS for c in changes),
            changed=tuple(sorted(changed, key=lambda a: a.kind == "changed")),
        )

    def details(self, harm: Unchanged, tokenizer: Any) -> dict[str, Any]:
        """Nothing: answers may hold text of the records."""
        return {}

    def answers(self, harm: Unchanged) -> tuple[Answered, ...]:
        """The prompts that are answered otherwise."""
        return harm.changed
