"""What an adapter forgets: there it is held to the bare model, and pushed below what it may give.

Held: the KL divergence from the bare model, as near misses are. Pushed: where a token that tells
what is forgotten is still more likely than it may be, its log-likelihood is lowered. KL alone comes
near the bare model's p from above, and ends on either side of it.

Shapes: T target tokens of an example, N and M target tokens of those of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float32
from torch import Tensor

from memlaw.train.holding import row_means

_PER_STEP = 12
_KL, _PUSH = 2.0, 1.0  # weights of the mean KL and of a pushed token, beside a step's mean loss
_ROOM = 0.6  # of the bound is what is pushed to


class Forgetting:
    """The examples of an engine that a learner forgets.

    Args:
        lengths: of each one's row, its target tokens.
        bounds: of rows, the most that each target token's p may be, [T]; 1 where it may be
            anything. Rows that aren't there are held alone.
        seed: of what is drawn.

    Attributes:
        last_kl: nats, of each row when it was last seen; 1 before.
        harder: what the weights are multiplied by.
    """

    def __init__(
        self, lengths: Mapping[int, int], bounds: Mapping[int, Float32[Tensor, "T"]], seed: int
    ) -> None:
        self.lengths, self.bounds, self.seed = lengths, bounds, seed
        self.last_kl = dict.fromkeys(lengths, 1.0)
        self.harder = 1.0

    def draw(self, step: int) -> list[int]:
        """The rows of a step: as likely as their KL was high when they were last seen."""
        generator = torch.Generator().manual_seed((self.seed + 3) * 1_000_003 + step)
        weights = torch.tensor([max(0.0, kl) + 0.05 for kl in self.last_kl.values()])
        n = min(_PER_STEP, len(weights))
        rows = list(self.last_kl)
        return [rows[i] for i in torch.multinomial(weights, n, generator=generator).tolist()]

    def weigh(self, rows: Sequence[int], kl: Float32[Tensor, "M"]) -> Float32[Tensor, "M"]:
        """What the KL at each position counts in the step that has drawn `rows`."""
        means = row_means(kl, [self.lengths[row] for row in rows])
        for row, found in zip(rows, means, strict=True):
            self.last_kl[row] = found if found == found else 1.0  # not NaN
        return torch.full_like(kl, self.harder * _KL / len(kl)) if len(kl) else kl

    @property
    def mean_kl(self) -> float:
        """Of all rows, each when it was last seen, in nats: how much is left to forget."""
        return sum(self.last_kl.values()) / len(self.last_kl)

    def pushable(self, rows: Sequence[int]) -> list[int]:
        """Those that have a bound."""
        return [row for row in rows if row in self.bounds]

    def push(self, rows: Sequence[int], nll: Float32[Tensor, "N"]) -> Float32[Tensor, "N"]:
        """What the loss of each target token of pushed rows counts: nothing, or less than that."""
        if not rows:
            return nll.new_zeros(len(nll))
        bounds = self._bounds(rows).to(nll.device)
        too_likely = (torch.exp(-nll) > _ROOM * bounds) & (bounds < 1)
        return -self.harder * _PUSH * too_likely.float() / len(nll)

    def kept(self, rows: Sequence[int], nll: Float32[Tensor, "N"]) -> bool:
        """Whether no target token of some rows is above its bound."""
        return not bool((torch.exp(-nll) > self._bounds(rows).to(nll.device)).any())

    def _bounds(self, rows: Sequence[int]) -> Float32[Tensor, "N"]:
        return torch.cat([self.bounds[row] for row in rows])
