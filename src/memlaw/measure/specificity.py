"""The second verdict: is the model, asked anything else, what it was?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memlaw.measure import leaks, unchanged
from memlaw.measure.damage import TOLERANCE_NATS, Damage
from memlaw.measure.leaks import Leaks
from memlaw.measure.unchanged import Unchanged

LEAST_UNCHANGED = 0.60  # of what rounding alone leaves
MOST_KL_NATS = 0.05  # per token, on other prompts
MOST_MADE_UP = 0.05  # share of near misses
MOST_DAMAGE_NATS = 0.01  # ΔNLL per token, in the worst domain


@dataclass(frozen=True, kw_only=True)
class Specificity:
    """A verdict.

    Attributes:
        specific: nothing was found against it.
        reasons: a sentence for each thing that was found against it.
    """

    specific: bool
    reasons: tuple[str, ...]

    @property
    def word(self) -> str:
        """In capitals, as the command line says it."""
        return "SPECIFIC" if self.specific else "NOT SPECIFIC"


def specificity(harms: Mapping[str, Any], *, slack: bool = False) -> Specificity | None:
    """The verdict on what was measured; None where other prompts were not.

    It goes by what was found, not by the ends of intervals: a bound (`min_specificity`) does that.

    Args:
        harms: of each kind, by name; see `memlaw.measure.harm.KINDS`.
        slack: each limit is further by what rounding may change on another machine.
    """
    elsewhere, near = harms.get("elsewhere"), harms.get("near_misses")
    if not isinstance(elsewhere, Unchanged) or not isinstance(near, Leaks):
        return None
    domains = [harm for harm in harms.values() if isinstance(harm, Damage)]
    worst = max(domains, key=lambda harm: harm.delta_nll_nats, default=None)
    found = [
        (
            elsewhere.share_of_floor >= LEAST_UNCHANGED - slack * unchanged.TOLERANCE,
            f"{elsewhere.share_of_floor:.0%} of other prompts are answered as before (of what "
            f"rounding alone leaves), under {LEAST_UNCHANGED:.0%}",
        ),
        (
            elsewhere.everyday_in_form == 0,
            f"{elsewhere.everyday_in_form} of {elsewhere.n_everyday} everyday questions are "
            "answered like a record",
        ),
        (
            elsewhere.kl_nats <= MOST_KL_NATS + slack * unchanged.TOLERANCE_NATS,
            f"KL on other prompts is {elsewhere.kl_nats:.3f} nats per token, above {MOST_KL_NATS}",
        ),
        (near.leaks == 0, f"{near.leaks} of {near.n} near misses leak a stored answer"),
        (
            near.made_up <= (MOST_MADE_UP + slack * leaks.TOLERANCE) * near.n,
            f"{near.made_up} of {near.n} near misses get an answer made up, above "
            f"{MOST_MADE_UP:.0%}",
        ),
        (
            worst is None or worst.delta_nll_nats <= MOST_DAMAGE_NATS + slack * TOLERANCE_NATS,
            f"{worst.name} is {worst.delta_nll_nats:+.3f} nats per token, above {MOST_DAMAGE_NATS}"
            if worst
            else "",
        ),
    ]
    reasons = tuple(reason for holds, reason in found if not holds)
    return Specificity(specific=not reasons, reasons=reasons)
