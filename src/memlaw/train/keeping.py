"""What an update of an adapter keeps as it was: the records that are written, without reading them.

The change of an adapter is itself a LoRA, `A B − A₀ B₀ = [A, A₀] [B; −B₀]`, so that what it does to
the written records is told by the quadratic form of retention with what the sites read on *them*:
it costs the same for ten records as for ten thousand. Which of them slip all the same, a look
tells.

Shapes: D_in and D_out widths of a site, R rank of the adapter, R₀ the one it started with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float32
from torch import Tensor

from memlaw.model.adapter import Adapter
from memlaw.train.retention import Term, quadratic_penalty


class Keeping:
    """The penalty on how far an adapter moves from where it started, as written records see it.

    Args:
        adapter: as it starts.
        terms: of the written records, in the coordinates that A is trained in.
        weight: what about a nat for each of their tokens counts, beside the step's mean loss.
    """

    def __init__(self, adapter: Adapter, terms: Sequence[Term], weight: float) -> None:
        self.terms, self.weight = terms, weight
        self.start = [
            (a.detach().clone(), b.detach().clone())
            for a, b in zip(adapter.a, adapter.b, strict=True)
        ]

    def loss(self, adapter: Adapter) -> Float32[Tensor, ""]:
        """The weighted penalty of a step; a scalar with a graph."""
        change = [
            (torch.cat([a, a0], dim=1), torch.cat([b, -b0]))
            for a, b, (a0, b0) in zip(adapter.a, adapter.b, self.start, strict=True)
        ]
        return self.weight * quadratic_penalty(self.terms, change)
