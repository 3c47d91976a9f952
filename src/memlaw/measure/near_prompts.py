"""Harm close by: prompts like the records' that ask for nothing stored must not get a record."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from memlaw.core.files import json_sha256
from memlaw.core.first_time import each_time
from memlaw.data.encoding import end_of_turn_id
from memlaw.data.form import Form
from memlaw.data.near_misses import NearMiss, near_misses
from memlaw.data.prompts import read_prompts
from memlaw.measure.answers import Answered, answer_text, decoded
from memlaw.measure.leaks import COUNTED, GIVEN, KindCounts, Leaks
from memlaw.measure.own_prompts import ANSWER_TOKENS, greedy_answers
from memlaw.measure.subject import Subject, title

N_NEAR, SEED = 200, 990_003
_LEAST_TOKENS = 12
_FIRST_TOKENS = 4


class NearMisses:
    """Measures how near misses are answered.

    Args:
        subject: the base model, the records, and a file of prompts if one is given.

    Attributes:
        made: the near misses: made from the records' prompts, and those of the file. Training must
            not see them.

    Raises:
        DataError: the file can't be read, or gives a record's own prompt.
    """

    name = "near_misses"
    bound = "min_specificity"

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.form = Form([record.completion for record in subject.records])
        prompts = [record.prompt for record in subject.records]
        given = read_prompts(subject.near) if subject.near else []
        stored = {repr(prompt) for prompt in prompts}
        given = [prompt for prompt in given if repr(prompt) not in stored]
        self.made = [
            *near_misses(prompts, N_NEAR, seed=SEED, avoid=given),
            *(NearMiss(prompt=prompt, kind=GIVEN) for prompt in given),
        ]

    @classmethod
    def of_run(cls, subject: Subject) -> NearMisses:
        """For a run of `write`."""
        return cls(subject)

    @classmethod
    def of_claim(cls, subject: Subject, claim: Mapping[str, Any]) -> NearMisses | None:
        """For what a certificate says; None if it was measured on other prompts."""
        here = cls(subject)
        return here if here.prompts_sha256 == claim["prompts_sha256"] else None

    @staticmethod
    def limit(setting: float) -> float:
        """What `high` must not be above."""
        return 1 - setting

    @staticmethod
    def read(claim: Mapping[str, Any]) -> Leaks:
        """What a certificate says; raises TypeError or ValueError if it can't be."""
        return Leaks.from_json(claim)

    @functools.cached_property
    def asked(self) -> list[tuple[NearMiss, tuple[int, ...]]]:
        """The near misses that can be asked, and their token ids."""
        kinds = {repr(near.prompt): near for near in self.made}
        encoded = self.subject.encoded([near.prompt for near in self.made], room=ANSWER_TOKENS)
        return [(kinds[repr(prompt)], ids) for prompt, ids in encoded]

    @property
    def prompts_sha256(self) -> str:
        """Hash of the prompts."""
        return json_sha256([[near.kind, ids] for near, ids in self.asked])

    @functools.cached_property
    def max_tokens(self) -> int:
        """As many as the longest completion has, within 12 to 32."""
        tokenizer = self.subject.base.tokenizer
        texts = [record.completion for record in self.subject.records]
        longest = max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) + 1
        return min(ANSWER_TOKENS, max(_LEAST_TOKENS, longest))

    @functools.cached_property
    def base_answers(self) -> list[tuple[int, ...]]:
        """The base model's."""
        subject, prompts = self.subject, [near.prompt for near, _ in self.asked]
        with each_time():
            return greedy_answers(
                subject.base, prompts, format=subject.format, max_tokens=self.max_tokens
            )

    def measure(self, model: Any, adapted: Callable[[], AbstractContextManager[Any]]) -> Leaks:
        """Of an adapter; `adapted` returns a context whose value is the model with it."""
        tokenizer = self.subject.base.tokenizer
        end = end_of_turn_id(tokenizer, self.subject.format)
        now = decoded(
            adapted, [ids for _, ids in self.asked], end_id=end, max_tokens=self.max_tokens
        )
        counts: dict[str, list[tuple[bool, bool, bool]]] = {}
        answered = []
        for (near, _), was, ids in zip(self.asked, self.base_answers, now, strict=True):
            before, after = answer_text(tokenizer, was), answer_text(tokenizer, ids)
            leak, before_leaks = (
                self.form.stored_in(text, cut=own[-1] != end)
                for text, own in ((after, ids), (before, was))
            )
            leak = leak and not before_leaks
            made_up = leak or (self.form.fits(after) and not self.form.fits(before))
            same = was[:_FIRST_TOKENS] == ids[:_FIRST_TOKENS]
            counts.setdefault(near.kind, []).append((leak, made_up, same))
            if made_up:
                what = f"{near.kind}: {'a stored answer' if leak else 'made up'}"
                answered.append(
                    (
                        near.kind not in COUNTED,
                        not leak,
                        Answered(prompt=title(near.prompt), before=before, after=after, kind=what),
                    )
                )
        return Leaks(
            by_kind={
                kind: KindCounts(
                    n=len(found),
                    leaks=sum(leak for leak, _, _ in found),
                    made_up=sum(made_up for _, made_up, _ in found),
                    unchanged=sum(same for _, _, same in found),
                )
                for kind, found in counts.items()
            },
            prompts_sha256=self.prompts_sha256,
            answered=tuple(a for *_, a in sorted(answered, key=lambda found: found[:2])),
        )

    def details(self, harm: Leaks, tokenizer: Any) -> dict[str, Any]:
        """Nothing: answers may hold text of the records."""
        return {}

    def answers(self, harm: Leaks) -> tuple[Answered, ...]:
        """The near misses that are answered like a record."""
        return harm.answered
