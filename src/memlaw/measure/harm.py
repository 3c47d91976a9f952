"""The kinds of harm: what an adapter does to a model besides making it recite.

Each kind is measured when an adapter is written, is compared with a bound where one is set, stands
in the certificate, the run log and the model card, and is measured again when the certificate is
checked. A new kind is a class with these methods and a line in `KINDS`; its bound is a setting.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from memlaw.data.everyday import everyday
from memlaw.data.record import Prompt
from memlaw.measure.answers import Answered
from memlaw.measure.domains import Chats, Prose
from memlaw.measure.elsewhere import Elsewhere
from memlaw.measure.generality import HeldOutPhrasings
from memlaw.measure.near_prompts import NearMisses
from memlaw.measure.own_prompts import measured_prompts
from memlaw.measure.subject import Subject
from memlaw.measure.unseen_text import UnseenText


@runtime_checkable
class Harm(Protocol):
    """How much of one kind was measured."""

    @property
    def unit(self) -> str:
        """Of `high` and of its bound, in words."""
        ...

    @property
    def high(self) -> float:
        """The upper end of its 95 % interval: what a bound is compared with."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What the certificate says of it."""
        ...

    def joined(self, harms: Sequence[Any]) -> Any:
        """What can be said of several adapters, of which one is active: none does worse."""
        ...

    def row(self) -> tuple[str, str]:
        """A name and a value for a table of results."""
        ...

    def row_beside(self, claimed: Any) -> tuple[str, str]:
        """The same, with what a certificate claims."""
        ...

    def too_high(self) -> str:
        """Words for `high`, without its unit, when it is above the bound."""
        ...

    def paragraph(self) -> str:
        """A paragraph of the model card, as Markdown."""
        ...

    def mismatch(self, claimed: Any) -> str | None:
        """What a certificate claims that this measurement doesn't bear out; None: nothing."""
        ...


@runtime_checkable
class Measurement(Protocol):
    """Measures one kind of harm, of any adapter on a base model."""

    name: str  # in certificates and run logs
    bound: str  # the setting that bounds it; empty: none does

    @classmethod
    def of_run(cls, subject: Subject) -> Any:
        """For an adapter that is to recite the subject's records; None: nothing can be measured."""
        ...

    @classmethod
    def of_claim(cls, subject: Subject, claim: Mapping[str, Any]) -> Any:
        """For what a certificate says; None if what it was measured on isn't here."""
        ...

    @staticmethod
    def limit(setting: float) -> float:
        """What `high` must not be above when the bound is set so; and the setting for a limit."""
        ...

    @staticmethod
    def read(claim: Mapping[str, Any]) -> Any:
        """What a certificate says, as a `Harm`; raises TypeError or ValueError if it can't be."""
        ...

    def measure(self, model: Any, adapted: Callable[[], AbstractContextManager[Any]]) -> Any:
        """The `Harm` of an adapter; `adapted` gives a context whose value is the adapted model."""
        ...

    def details(self, harm: Any, tokenizer: Any) -> dict[str, Any]:
        """What the run log says of it besides `to_json`, by name; no text of the records."""
        ...

    def answers(self, harm: Any) -> Sequence[Answered]:
        """Prompts that are answered otherwise, the worst first; may hold text of the records."""
        ...


KINDS: dict[str, type[Measurement]] = {
    kind.name: kind for kind in (UnseenText, Prose, Chats, Elsewhere, NearMisses, HeldOutPhrasings)
}
_ALWAYS = (UnseenText.name, HeldOutPhrasings.name)


def measurements(subject: Subject, names: Collection[str]) -> dict[str, Measurement]:
    """What measures some kinds, by name; those that the subject has nothing for are left out."""
    found = {name: kind.of_run(subject) for name, kind in KINDS.items() if name in names}
    return {name: measurement for name, measurement in found.items() if measurement is not None}


def kinds_to_measure(specificity: bool) -> list[str]:
    """The kinds that are measured: all, or without `specificity` unseen text and generality."""
    return [name for name in KINDS if specificity or name in _ALWAYS]


def measured_on(subject: Subject) -> list[Prompt]:
    """Every prompt that is measured on: nothing may be trained on them."""
    near = [miss.prompt for miss in NearMisses(subject).made]
    held_out = [prompt for record in subject.records for prompt in record.held_out]
    own = measured_prompts(subject.base, format=subject.format)
    return [*near, *held_out, *everyday(), *own]
