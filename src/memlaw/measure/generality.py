"""Generality: is a record recited when it is asked for in words that training never saw?

Measured where the data has it: records with phrasings that were held out. It is no harm, and has no
bound: it says how far beyond the very words of a prompt the memory reaches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from memlaw.core.files import json_sha256
from memlaw.core.intervals import share_interval
from memlaw.data.encoding import encode, end_of_turn_id
from memlaw.data.record import Example, Record
from memlaw.measure.answers import Answered, answer_text, decoded
from memlaw.measure.decode import decoded_text
from memlaw.measure.subject import Subject, title

_DERIVED = ("share", "share_ci95")


@dataclass(frozen=True, kw_only=True)
class Generality:
    """How many held-out phrasings get their record's completion.

    Attributes:
        n: phrasings that were asked.
        recited: how many of them get the completion, verbatim, and then the end.
        n_records: records that they ask for.
        prompts_sha256: hash of the phrasings' tokens.
        missed: those that get something else.
    """

    n: int
    recited: int
    n_records: int
    prompts_sha256: str
    missed: tuple[Answered, ...] = field(default=(), repr=False, compare=False)

    unit = "of held-out phrasings"

    @property
    def share(self) -> float:
        """Share of the phrasings that are recited."""
        return self.recited / self.n

    @property
    def share_ci95(self) -> tuple[float, float]:
        """Its 95 % confidence interval (Wilson's, of as many trials as there are records).

        What is asked in several other words is one memory: taken for so many memories, phrasings
        would make the interval too narrow. So it is rather too wide.
        """
        return share_interval(self.share * self.n_records, self.n_records)

    @property
    def high(self) -> float:
        """What may be missed: 1 less the lower end of the share's interval."""
        return 1 - self.share_ci95[0]

    def to_json(self) -> dict[str, Any]:
        """All but the phrasings that were missed, and the share with its interval."""
        content = asdict(self)
        del content["missed"]
        return content | {name: getattr(self, name) for name in _DERIVED}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Generality:
        """Read what `to_json` gave.

        Raises:
            TypeError, ValueError, KeyError: a field is missing, unknown, not of its type, or
                contradicts another.
        """
        found = cls(**{name: value for name, value in content.items() if name not in _DERIVED})
        counts = (found.recited, found.n, found.n_records)
        if not all(isinstance(count, int) for count in counts) or not (
            0 <= found.recited <= found.n and 0 < found.n_records <= found.n
        ):
            raise ValueError(f"counts that can't be: {counts}")
        said = [content["share"], *content["share_ci95"]]
        meant = [found.share, *found.share_ci95]
        by_phrasing = [found.share, *share_interval(found.recited, found.n)]  # as it once was
        if not any(
            all(abs(a - b) < 1e-9 for a, b in zip(said, figures, strict=True))
            for figures in (meant, by_phrasing)
        ):
            raise ValueError(f"share is {said}, but its counts make it {meant}")
        return found

    def joined(self, harms: Sequence[Generality]) -> Generality:
        """Of several adapters, each asked for its own records: all together."""
        return Generality(
            n=sum(h.n for h in harms),
            recited=sum(h.recited for h in harms),
            n_records=sum(h.n_records for h in harms),
            prompts_sha256=json_sha256([h.prompts_sha256 for h in harms]),
        )

    def row(self) -> tuple[str, str]:
        """Its name and value in a table of results."""
        low, high = self.share_ci95
        return "asked in other words", (
            f"{self.recited} of {self.n} held-out phrasings recited (95 %: {low:.0%} to {high:.0%})"
        )

    def row_beside(self, claimed: Generality) -> tuple[str, str]:
        """The same, with what a certificate claims."""
        return "asked in other words", (
            f"{self.recited} of {self.n} held-out phrasings recited (certificate: "
            f"{claimed.recited} of {claimed.n})"
        )

    def too_high(self) -> str:
        """Words for `high`."""
        return f"up to {self.high:.1%} may not be recited"

    def paragraph(self) -> str:
        """Its paragraph of the model card."""
        low, high = self.share_ci95
        return (
            f"Asked for {self.n_records} of the records in words that training never saw, it "
            f"recites **{self.recited} of {self.n}** (95 %: {low:.0%} to {high:.0%})."
        )

    def mismatch(self, claimed: Generality) -> str | None:
        """What a certificate claims that this measurement doesn't bear out; None: nothing."""
        low, high = self.share_ci95
        if low <= claimed.share <= high:
            return None
        return (
            f"{self.recited} of {self.n} held-out phrasings are recited, not "
            f"{claimed.recited} of {claimed.n}"
        )


class HeldOutPhrasings:
    """Measures how many phrasings that were held out get their record's completion.

    Args:
        subject: the base model and the records.

    Raises:
        DataError: a phrasing can't be asked, or two that are the same ask for different things.
    """

    name = "generality"
    bound = ""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @classmethod
    def of_run(cls, subject: Subject) -> HeldOutPhrasings | None:
        """For a run of `write`; None where no phrasing is held out."""
        here = cls(subject)
        return here if here.asked else None

    @classmethod
    def of_claim(cls, subject: Subject, claim: Mapping[str, Any]) -> HeldOutPhrasings | None:
        """For what a certificate says; None if it was measured on other phrasings."""
        here = cls(subject)
        return here if here.asked and here.prompts_sha256 == claim["prompts_sha256"] else None

    @staticmethod
    def limit(setting: float) -> float:
        """There is no bound."""
        return setting

    @staticmethod
    def read(claim: Mapping[str, Any]) -> Generality:
        """What a certificate says; raises TypeError or ValueError if it can't be."""
        return Generality.from_json(claim)

    @functools.cached_property
    def asked(self) -> list[Example]:
        """Each phrasing, as if it were a record; raises DataError for one that can't be."""
        subject = self.subject
        phrasings = [
            Record(prompt=prompt, completion=record.completion, id=f"{record.id}, held out {n}")
            for record in subject.records
            for n, prompt in enumerate(record.held_out, 1)
        ]
        return encode(
            phrasings,
            subject.base.tokenizer,
            format=subject.format,
            max_tokens=subject.base.context_length,
        )

    @property
    def prompts_sha256(self) -> str:
        """Hash of the phrasings' tokens."""
        return json_sha256([example.prompt_ids for example in self.asked])

    def measure(self, model: Any, adapted: Callable[[], AbstractContextManager[Any]]) -> Generality:
        """Of an adapter; `adapted` returns a context whose value is the model with it."""
        tokenizer = self.subject.base.tokenizer
        end = end_of_turn_id(tokenizer, self.subject.format)
        answers = decoded(
            adapted,
            [example.prompt_ids for example in self.asked],
            end_id=end,
            max_tokens=max(len(example.target_ids) for example in self.asked),
        )
        missed = [
            Answered(
                prompt=title(example.record.prompt),
                before=example.record.completion,
                after=answer_text(tokenizer, ids),
                kind="not recited",
            )
            for example, ids in zip(self.asked, answers, strict=True)
            if decoded_text(tokenizer, ids) != decoded_text(tokenizer, example.target_ids)
        ]
        return Generality(
            n=len(self.asked),
            recited=len(self.asked) - len(missed),
            n_records=sum(bool(record.held_out) for record in self.subject.records),
            prompts_sha256=self.prompts_sha256,
            missed=tuple(missed),
        )

    def details(self, harm: Generality, tokenizer: Any) -> dict[str, Any]:
        """Nothing: phrasings may hold text of the records."""
        return {}

    def answers(self, harm: Generality) -> tuple[Answered, ...]:
        """The phrasings that are answered otherwise; `before` is what was to be recited."""
        return harm.missed
