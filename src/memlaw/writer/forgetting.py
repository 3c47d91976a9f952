"""Removed records: what is trained so that they are forgotten, and what of that is on record."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from memlaw.core.first_time import each_time
from memlaw.data.activation import activated
from memlaw.data.encoding import encode
from memlaw.data.record import Example, Record
from memlaw.measure.forgotten import Forgotten, attempted, bounds_of
from memlaw.measure.own_prompts import greedy_answers
from memlaw.measure.subject import Subject
from memlaw.settings.update import Forget
from memlaw.train.forgetting import Forgetting


@dataclass(frozen=True, kw_only=True)
class ToForget:
    """What is to be forgotten, as tokens.

    Attributes:
        records: the removed records.
        recited: each of them, and prompts that are nearly its own, with the record's target: p of
            that must fall.
        answered: their prompts with the bare model's answers, which are to come back.
    """

    records: list[Example]
    recited: list[Example]
    answered: list[Example]

    @property
    def examples(self) -> list[Example]:
        """All that is held to the bare model."""
        return [*self.recited, *self.answered]

    def forgetting(self, subject: Subject, first: int, seed: int) -> Forgetting:
        """How a learner forgets it; the engine's examples have it from row `first` on."""
        rows = range(first, first + len(self.examples))
        lengths = [len(example.target_ids) for example in self.examples]
        bounds = bounds_of(subject.base, self.recited)
        return Forgetting(
            dict(zip(rows, lengths, strict=True)),
            dict(zip(rows, bounds, strict=False)),  # those of `recited` come first
            seed,
        )


def to_forget(
    subject: Subject, removed: Sequence[Record], invocation_ids: Sequence[int]
) -> ToForget:
    """Make the examples that removed records are forgotten with.

    Args:
        subject: the bare model, and the records that stay.
        removed: at least one.
        invocation_ids: from which on the adapter is active; none at all: everywhere.
    """
    base, avoid = subject.base, [record.prompt for record in subject.records]
    records = encode(removed, base.tokenizer, format=subject.format, max_tokens=base.context_length)
    if invocation_ids:
        records = activated(records, invocation_ids)
    recited = list(records)
    for example in records:
        recited += attempted(
            subject, example, trained=True, avoid=avoid, invocation_ids=invocation_ids
        )
    with each_time():
        answers = greedy_answers(base, [record.prompt for record in removed], format=subject.format)
    answered = [
        replace(example, target_ids=answer)
        for example, answer in zip(records, answers, strict=True)
        if answer
    ]
    return ToForget(records=records, recited=recited, answered=answered)


def forgotten_json(
    records: Sequence[Record], found: Sequence[Forgotten], strength: Forget
) -> dict[str, Any]:
    """What stays on record of forgotten records: how they were looked for, and what was found.

    Each is named by a salted hash that takes long to compute. Whoever already knows prompt and
    completion can find it; a guesser pays for each guess.
    """
    salt = secrets.token_bytes(16)
    return {
        "strength": strength,
        "holds": all(one.holds for one in found),
        "salt": salt.hex(),
        "hash": "scrypt n=16384 r=8 p=1, of the record's sha256 in hexadecimal",
        "records": [
            {"hash": salted(record, salt), **one.to_json()}
            for record, one in zip(records, found, strict=True)
        ],
    }


def salted(record: Record, salt: bytes) -> str:
    """The salted hash of a record."""
    return hashlib.scrypt(record.sha256.encode(), salt=salt, n=2**14, r=8, p=1, dklen=16).hex()
