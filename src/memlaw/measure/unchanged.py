"""How many prompts that have nothing to do with the records are answered as before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from memlaw.core.intervals import highest, share_interval
from memlaw.measure.answers import Answered
from memlaw.measure.own_prompts import ANSWER_TOKENS

TOLERANCE = 0.03  # of a share: what rounding may change on another machine
TOLERANCE_NATS = 0.01
OVERTURNED_NATS = math.log(2)  # half as likely; a near tie is less than that


@dataclass(frozen=True, kw_only=True)
class Unchanged:
    """How many prompts that have nothing to do with the records are answered as before.

    Attributes:
        n: prompts asked: everyday questions, and prompts that the base model writes itself.
        n_everyday: how many are everyday questions.
        unchanged, everyday_unchanged: how many of them have the base model's answer, 32 tokens.
        floor: how many the bare model answers so itself, in another batch; at least 1 is meant.
        everyday_in_form: everyday questions that are answered in the records' form, and were not.
        kl_nats: mean KL(base ‖ adapted) along the base model's answers, nats per token.
        kl_ci95: its 95 % confidence interval (Student's t over prompts).
        kl_worst_nats: of the prompt that changed most.
        prompts_sha256: hash of the prompts.
        overturned: those whose answer first differs in a token that the base model holds less than
            half as likely as its own; the others leave it where it hardly prefers its own token.
            None: a certificate from before this was measured.
        changed: prompts that are answered otherwise, the most changed first.
    """

    n: int
    n_everyday: int
    unchanged: int
    everyday_unchanged: int
    floor: int
    everyday_in_form: int
    kl_nats: float
    kl_ci95: tuple[float, float]
    kl_worst_nats: float
    prompts_sha256: str
    overturned: int | None = None
    changed: tuple[Answered, ...] = field(default=(), repr=False, compare=False)

    unit = "of what rounding leaves"

    @property
    def share(self) -> float:
        """Share of prompts that are answered as before."""
        return self.unchanged / self.n

    @property
    def share_ci95(self) -> tuple[float, float]:
        """Its 95 % confidence interval (Wilson's)."""
        return share_interval(self.unchanged, self.n)

    @property
    def share_of_floor(self) -> float:
        """`share`, as a share of what rounding alone leaves; at most 1."""
        return min(1.0, self.unchanged / max(1, self.floor))

    @property
    def share_of_floor_ci95(self) -> tuple[float, float]:
        """Its 95 % confidence interval, the floor taken as it is."""
        low, high = (min(1.0, end * self.n / max(1, self.floor)) for end in self.share_ci95)
        return low, high

    @property
    def high(self) -> float:
        """What may have changed: 1 less the lower end of `share_of_floor`."""
        return 1 - self.share_of_floor_ci95[0]

    def to_json(self) -> dict[str, Any]:
        """All but the prompts that changed, and the shares with their intervals."""
        content = asdict(self)
        del content["changed"]
        return content | {name: getattr(self, name) for name in _DERIVED}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Unchanged:
        """Read what `to_json` gave.

        Raises:
            TypeError, ValueError: a field is missing, unknown, not of its type, or contradicts
                another.
        """
        own = {name: value for name, value in content.items() if name not in _DERIVED}
        low, high = own.get("kl_ci95", (0.0, 0.0))
        found = cls(**{**own, "kl_ci95": (float(low), float(high))})
        counts = (found.everyday_unchanged, found.unchanged, found.n)
        overturned = found.overturned or 0
        if not 0 <= overturned <= found.n - found.unchanged:
            raise ValueError(f"{overturned} overturned, {found.unchanged} of {found.n} unchanged")
        if not 0 <= counts[0] <= counts[1] <= counts[2] or not 0 < found.floor <= found.n:
            raise ValueError(f"counts that can't be: {counts}, floor {found.floor}")
        if not 0 <= found.everyday_in_form <= found.n_everyday <= found.n or not low <= high:
            raise ValueError("counts or an interval that can't be")
        for name in _DERIVED:
            said, meant = content[name], getattr(found, name)
            pairs = [(said, meant)] if isinstance(meant, float) else zip(said, meant, strict=True)
            if any(not abs(a - b) < 1e-9 for a, b in pairs):
                raise ValueError(f"{name} is {said}, but its counts make it {meant}")
        return found

    def joined(self, harms: Sequence[Unchanged]) -> Unchanged:
        """Of several adapters on the same prompts: each figure that of the one worst in it."""
        least = min(harms, key=lambda h: h.share_of_floor)
        known = [h.overturned for h in harms if h.overturned is not None]
        return replace(
            least,
            everyday_unchanged=min(h.everyday_unchanged for h in harms),
            everyday_in_form=max(h.everyday_in_form for h in harms),
            kl_nats=max(h.kl_nats for h in harms),
            kl_ci95=highest(h.kl_ci95 for h in harms),
            kl_worst_nats=max(h.kl_worst_nats for h in harms),
            overturned=(
                min(max(known), least.n - least.unchanged) if len(known) == len(harms) else None
            ),
            changed=(),
        )

    def row(self) -> tuple[str, str]:
        """Its name and value in a table of results."""
        low, high = self.share_of_floor_ci95
        return "unchanged elsewhere", (
            f"{self.unchanged} of {self.n} answers, {self.share_of_floor:.0%} of the {self.floor} "
            f"that rounding leaves (95 %: {low:.0%} to {high:.0%}), {self._overturned()}"
            f"{self.everyday_in_form} like a record; KL {self.kl_nats:.3f} nats per token"
        )

    def _overturned(self) -> str:
        return "" if self.overturned is None else f"{self.overturned} overturned, "

    def row_beside(self, claimed: Unchanged) -> tuple[str, str]:
        """The same, with what a certificate claims."""
        low, high = claimed.share_of_floor_ci95
        return "unchanged elsewhere", (
            f"{self.share_of_floor:.1%} (certificate, 95 %: {low:.1%} to {high:.1%}); KL "
            f"{self.kl_nats:.4f} nats per token (certificate: {claimed.kl_nats:.4f})"
        )

    def too_high(self) -> str:
        """Words for `high`, when it is above the bound."""
        return f"only {1 - self.high:.1%} of other prompts may be answered as before"

    def paragraph(self) -> str:
        """Its paragraph of the model card."""
        low, high = self.share_of_floor_ci95
        form = (
            "none of them is answered like a record"
            if self.everyday_in_form == 0
            else f"**{self.everyday_in_form} of {self.n_everyday} everyday questions are answered "
            "like a record**"
        )
        overturned = (
            ""
            if self.overturned is None
            else f"{self.overturned} of the answers that changed were *overturned*: they first "
            "differ in a token that the base model holds less than half as likely as its own. "
        )
        return (
            f"Asked {self.n} other things ({self.n_everyday} everyday questions, and prompts that "
            f"the base model writes itself), it answers {self.unchanged} word for word as before, "
            f"over {ANSWER_TOKENS} tokens: **{self.share_of_floor:.0%}** of the {self.floor} that "
            f"rounding alone leaves (95 % interval {low:.0%} to {high:.0%}); {form}. {overturned}"
            f"Along those answers its predictions move by a KL divergence of {self.kl_nats:.3f} "
            f"nats a token (the worst prompt: {self.kl_worst_nats:.2f})."
        )

    def mismatch(self, claimed: Unchanged) -> str | None:
        """What a certificate claims that this measurement doesn't bear out; None: nothing."""
        low, high = self.share_of_floor_ci95
        if not low - TOLERANCE <= claimed.share_of_floor <= high + TOLERANCE:
            return (
                f"{self.share_of_floor:.1%} of other prompts are answered as before, not "
                f"{claimed.share_of_floor:.1%}"
            )
        low, high = self.kl_ci95
        if not low - TOLERANCE_NATS <= claimed.kl_nats <= high + TOLERANCE_NATS:
            return (
                f"KL on other prompts is {self.kl_nats:.4f} nats a token, not {claimed.kl_nats:.4f}"
            )
        if self.overturned is not None and claimed.overturned is not None:
            low, high = share_interval(self.overturned, self.n)
            if not low <= claimed.overturned / claimed.n <= high:
                return f"{self.overturned} answers are overturned, not {claimed.overturned}"
        if abs(self.everyday_in_form - claimed.everyday_in_form) > TOLERANCE * self.n_everyday or (
            self.everyday_in_form and not claimed.everyday_in_form
        ):
            return (
                f"{self.everyday_in_form} everyday questions are answered like a record, not "
                f"{claimed.everyday_in_form}"
            )
        return None


_DERIVED = ("share", "share_ci95", "share_of_floor", "share_of_floor_ci95")
