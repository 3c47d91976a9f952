"""What an update of an adapter keeps as it was: the records that are written, without reading them.

The change of an adapter is itself a LoRA, `A B − A₀ B₀ = [A, A₀] [B; −B₀]`, so that what it does to
the written records is told by the quadratic form of retention with what the sites read on *them*:
it costs the same for ten records as for ten thousand. Which of them slip all the same, a look
tells.

What moves least is what stands still: where little changes, the columns that were written are left
alone, and new ones beside them learn it. Room for those is made by narrowing what was written, as
far as it doesn't show.

Shapes: D_in and D_out widths of a site, R rank of the adapter, R₀ the one it started with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float32
from torch import Tensor

from memlaw.model.adapter import Adapter
from memlaw.train.retention import Term, quadratic_penalty

SLACK = 0.035  # of p: what rounding may take in the audit's batches
_PATIENT = 3  # times that the hold gives way before all is trained


class Keeping:
    """The penalty on how far an adapter moves from where it started, as written records see it.

    Args:
        adapter: as it starts.
        terms: of the written records, in the coordinates that A is trained in.
        weight: what about a nat for each of their tokens counts, beside the step's mean loss.
        still: so many of its first columns of A, and rows of B, aren't trained.

    Attributes:
        terms: as given; `weight`, `still` likewise, until they give way.
        slack: how much p must be above the line where an audit is to be worth its time.
        n_slipped: of the records that aren't trained, at the last look.
        least_under: tokens under the line, of what is trained, so far.
        progress_at: the epoch in which there were so few first, or the hold was loosened last.
    """

    def __init__(
        self, adapter: Adapter, terms: Sequence[Term], weight: float, still: int = 0
    ) -> None:
        self.terms, self.weight, self.still = terms, weight, still
        self.slack = SLACK
        self.n_given = self.progress_at = 0
        self.n_slipped = self.least_under = math.inf
        self.start = [
            (a.detach().clone(), b.detach().clone())
            for a, b in zip(adapter.a, adapter.b, strict=True)
        ]

    def loss(self, adapter: Adapter) -> Float32[Tensor, ""]:
        """The weighted penalty of a step; a scalar with a graph."""
        n = self.still
        change = (
            [(a[:, n:], b[n:]) for a, b in zip(adapter.a, adapter.b, strict=True)]
            if n
            else [
                (torch.cat([a, a0], dim=1), torch.cat([b, -b0]))
                for a, b, (a0, b0) in zip(adapter.a, adapter.b, self.start, strict=True)
            ]
        )
        return self.weight * quadratic_penalty(self.terms, change)

    def hold_still(self, adapter: Adapter) -> None:
        """Take the gradients of what isn't trained away."""
        for a, b in zip(adapter.a, adapter.b, strict=True):
            for part in (a.grad[:, : self.still], b.grad[: self.still]):
                part.zero_()

    def give_way(self) -> None:
        """Hold less tightly: half the weight; from the third time on everything is trained."""
        self.weight /= 2
        self.n_given += 1
        if self.n_given >= _PATIENT:
            self.still = 0


@torch.no_grad()
def narrowed(adapter: Adapter, terms: Sequence[Term], rank: int) -> Adapter:
    """The adapter of a lower rank that does most nearly the same, as the terms see it.

    Args:
        adapter: trained.
        terms: of all its sites, in the coordinates that A is trained in.
        rank: 1 to under its own.
    """
    narrow = adapter.fresh(rank)
    for term in terms:
        for site, reads, writes in zip(term.sites, term.reads, term.writes, strict=True):
            a, b = adapter.a[site].double(), adapter.b[site].double()
            read = torch.linalg.qr(reads.double() @ a).R  # [R, R]: what is read, and written
            write = torch.linalg.qr(writes.double() @ b.T).R
            left, values, right = torch.linalg.svd(read @ write.T)
            roots = values[:rank].sqrt()
            narrow.a[site].copy_(a @ torch.linalg.pinv(read) @ (left[:, :rank] * roots))
            narrow.b[site].copy_((roots[:, None] * right[:rank]) @ torch.linalg.pinv(write).T @ b)
    return narrow
