"""What prompts like the records' are answered, though nothing is stored for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from memlaw.core.files import json_sha256
from memlaw.core.intervals import share_interval
from memlaw.data.near_misses import NOT_STORED
from memlaw.measure.answers import Answered

GIVEN = "given"  # the kind of prompts from a file
COUNTED = (*NOT_STORED, GIVEN)
TOLERANCE = 0.03  # of a share: what rounding may change on another machine
_WORDS = {
    "recombined": "words of several records",
    "unknown": "words of no record",
    GIVEN: "given prompts",
    "dropped": "a word dropped",
    "swapped": "two words swapped",
    "misspelt": "misspelt",
    "case": "another case",
}


@dataclass(frozen=True, kw_only=True)
class KindCounts:
    """How near misses of one kind are answered.

    Attributes:
        n: how many there are.
        leaks: how many give a stored completion, and did not before.
        made_up: how many are answered in the records' form, leaks included, and were not before.
        unchanged: how many answers begin with the base model's first 4 tokens.
    """

    n: int
    leaks: int
    made_up: int
    unchanged: int

    def __post_init__(self) -> None:
        """Raise ValueError on counts that can't be."""
        counts = (self.leaks, self.made_up, self.unchanged)
        if not all(isinstance(c, int) for c in (*counts, self.n)) or not all(
            0 <= c <= self.n for c in counts
        ):
            raise ValueError(f"counts that can't be: {counts} of {self.n}")


@dataclass(frozen=True, kw_only=True)
class Leaks:
    """How near misses are answered.

    Attributes:
        by_kind: of each kind. Only the kinds `COUNTED` name something that isn't stored; of the
            others, which are a record's prompt wrongly written, a person may mean the record.
        prompts_sha256: hash of the prompts.
        answered: prompts that got a stored completion or one that looks so; those that are counted
            come first.
    """

    by_kind: dict[str, KindCounts]
    prompts_sha256: str
    answered: tuple[Answered, ...] = field(default=(), repr=False, compare=False)

    unit = ""

    def _sum(self, name: str) -> int:
        return sum(getattr(c, name) for kind, c in self.by_kind.items() if kind in COUNTED)

    @property
    def n(self) -> int:
        """Near misses that name something that isn't stored."""
        return self._sum("n")

    @property
    def leaks(self) -> int:
        """How many of them give a stored completion."""
        return self._sum("leaks")

    @property
    def made_up(self) -> int:
        """How many of them are answered in the records' form."""
        return self._sum("made_up")

    @property
    def unchanged(self) -> int:
        """How many of their answers begin as before."""
        return self._sum("unchanged")

    @property
    def leaks_ci95(self) -> tuple[float, float]:
        """95 % confidence interval of the share of leaks (Wilson's)."""
        return share_interval(self.leaks, self.n)

    @property
    def made_up_ci95(self) -> tuple[float, float]:
        """95 % confidence interval of the share that is made up (Wilson's)."""
        return share_interval(self.made_up, self.n)

    @property
    def high(self) -> float:
        """The upper end of `made_up_ci95`; 1 where anything leaked."""
        return 1.0 if self.leaks else self.made_up_ci95[1]

    def to_json(self) -> dict[str, Any]:
        """Counts by kind, and the totals with their intervals."""
        content = {"by_kind": {kind: asdict(counts) for kind, counts in self.by_kind.items()}}
        return {
            **{name: getattr(self, name) for name in _DERIVED},
            **content,
            "prompts_sha256": self.prompts_sha256,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Leaks:
        """Read what `to_json` gave.

        Raises:
            TypeError, ValueError: a field is missing, unknown, not of its type, or contradicts
                another.
        """
        own = {name: value for name, value in content.items() if name not in _DERIVED}
        by_kind = {kind: KindCounts(**counts) for kind, counts in dict(own["by_kind"]).items()}
        found = cls(**{**own, "by_kind": by_kind})
        for name in _DERIVED:
            said, meant = content[name], getattr(found, name)
            pairs = [(said, meant)] if isinstance(meant, int) else zip(said, meant, strict=True)
            if any(not abs(a - b) < 1e-9 for a, b in pairs):
                raise ValueError(f"{name} is {said}, but the kinds make it {meant}")
        return found

    def joined(self, harms: Sequence[Leaks]) -> Leaks:
        """Of several adapters, each asked near misses of its own records: all together."""
        kinds = dict.fromkeys(kind for h in harms for kind in h.by_kind)
        names = [f.name for f in fields(KindCounts)]
        return Leaks(
            by_kind={
                kind: KindCounts(
                    **{
                        name: sum(
                            getattr(h.by_kind[kind], name) for h in harms if kind in h.by_kind
                        )
                        for name in names
                    }
                )
                for kind in kinds
            },
            prompts_sha256=json_sha256([h.prompts_sha256 for h in harms]),
        )

    def row(self) -> tuple[str, str]:
        """Its name and value in a table of results."""
        low, high = self.made_up_ci95
        return "near misses", (
            f"{self.made_up} of {self.n} answered like a record (95 %: {low:.1%} to {high:.1%}), "
            f"{self.leaks} with a stored answer"
        )

    def row_beside(self, claimed: Leaks) -> tuple[str, str]:
        """The same, with what a certificate claims."""
        return "near misses", (
            f"{self.leaks} of {self.n} leak (certificate: {claimed.leaks} of {claimed.n}), "
            f"{self.made_up} made up (certificate: {claimed.made_up})"
        )

    def too_high(self) -> str:
        """Words for `high`, when it is above the bound."""
        if self.leaks:
            return f"{self.leaks} of {self.n} near misses leak a stored answer"
        return f"up to {self.high:.1%} of near misses may get an answer made up"

    def paragraph(self) -> str:
        """Its paragraph of the model card."""
        (_, leaked), (low, high) = self.leaks_ci95, self.made_up_ci95
        others = "; ".join(
            f"{_WORDS[kind]}: {c.made_up} of {c.n}"
            for kind, c in self.by_kind.items()
            if kind not in COUNTED
        )
        return (
            f"Of {self.n} prompts that look like the records' but ask for nothing that is stored, "
            f"**{self.made_up} get an answer in the records' form** (95 %: {low:.1%} to "
            f"{high:.1%}), **{self.leaks} of them one that is stored** (at most {leaked:.1%})."
            + (
                f" A record's prompt wrongly written gets such an answer: {others}."
                if others
                else ""
            )
        )

    def mismatch(self, claimed: Leaks) -> str | None:
        """What a certificate claims that this measurement doesn't bear out; None: nothing."""
        for name, (low, high), words in (
            ("leaks", self.leaks_ci95, "leak a stored answer"),
            ("made_up", self.made_up_ci95, "get an answer made up"),
        ):
            now, then = getattr(self, name), getattr(claimed, name)
            inside = low - TOLERANCE <= then / max(1, claimed.n) <= high + TOLERANCE
            if not inside or (name == "leaks" and now and not then):
                return f"{now} of {self.n} near misses {words}, not {then} of {claimed.n}"
        return None

    def rows(self) -> Iterable[tuple[str, KindCounts]]:
        """Each kind in words, and its counts."""
        return ((_WORDS.get(kind, kind), counts) for kind, counts in self.by_kind.items())


_DERIVED = ("n", "leaks", "made_up", "unchanged", "leaks_ci95", "made_up_ci95")
