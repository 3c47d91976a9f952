"""What a token needs to be certified."""

from __future__ import annotations

from dataclasses import dataclass

MOST_FLIPS = 1e-3  # of answers that other batches may be expected to give otherwise


def of_thousand(n: float) -> str:
    """So many of a thousand answers, in two digits: `0.34`, `153`, `under 0.01`."""
    if n < 0.01:
        return "under 0.01"
    return f"{n:.2g}" if n < 10 else f"{n:.0f}"


@dataclass(frozen=True)
class Criterion:
    """The least probability that a certified token has.

    Attributes:
        threshold: in [0.5, 1). A token with p > 0.5 is the argmax.
        margin: how far above the threshold, against rounding; ≥ 0, threshold + margin < 1.
    """

    threshold: float = 0.5
    margin: float = 0.05

    @property
    def line(self) -> float:
        """threshold + margin: the p that a certified token has at least."""
        return self.threshold + self.margin
