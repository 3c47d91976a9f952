"""What training has seen of each target token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor


class Seen:
    """The probability of each target token when it was last seen, and what follows from that.

    Args:
        lengths: target tokens of each record.
        rows: the records that are trained.
        line_p: the probability from which a token counts as done.

    Attributes:
        p: [target tokens of all records] float16, record after record; 0 where none was seen yet.
        lengths: [records] int64.
        over_at_start: share of the target tokens that were over the line in the first epoch; None
            before its end.
    """

    def __init__(self, lengths: Sequence[int], rows: Int64[Tensor, "rows"], line_p: float) -> None:
        self.lengths = torch.tensor(lengths)
        self.rows = rows
        self.line_p = line_p
        self.p = torch.zeros(sum(lengths), dtype=torch.float16)
        self.over_at_start: float | None = None
        self._ends = self.lengths.cumsum(0)

    def mask(self, rows: Sequence[int]) -> Bool[Tensor, "B T"]:
        """Where the target tokens of the records `rows` stand, when these are filled up."""
        lengths = self.lengths[list(rows)]
        return torch.arange(int(lengths.max())) < lengths[:, None]

    def note(self, rows: Sequence[int], nll: Float32[Tensor, "N"]) -> int:
        """Note what an epoch finds of the records `rows`.

        Args:
            rows: the records.
            nll: nats, their target tokens one record after the other.

        Returns:
            How many of the tokens fell back under the line since they were last seen.
        """
        ends = self._ends[list(rows)].tolist()
        found = torch.exp(-nll.detach()).to("cpu", torch.float16)
        n_relapses = 0
        for end, part in zip(ends, found.split(self.lengths[list(rows)].tolist()), strict=True):
            before = self.p[end - len(part) : end]
            n_relapses += int(((before >= self.line_p) & (part < self.line_p)).sum())
            self.p[end - len(part) : end] = part
        return n_relapses

    def places(self, rows: Sequence[int]) -> Int64[Tensor, "N"]:
        """Where the target tokens of the records `rows` lie in `p`, one record after the other."""
        ends, lengths = self._ends[list(rows)].tolist(), self.lengths[list(rows)].tolist()
        return torch.cat([torch.arange(end - n, end) for end, n in zip(ends, lengths, strict=True)])

    def n_under(self, rows: Sequence[int], p: float | None = None) -> int:
        """Target tokens of the records `rows` that were under p, or the line, when last seen."""
        p = self.line_p if p is None else p
        ends = self._ends.tolist()
        return sum(
            int((self.p[ends[row] - int(self.lengths[row]) : ends[row]] < p).sum()) for row in rows
        )

    def share_under(self) -> float:
        """The share of the trained records that had a token under the line when last seen."""
        under = torch.zeros(len(self.p) + 1, dtype=torch.int64)
        under[1:] = (self.p < self.line_p).cumsum(0)
        ends = self._ends[self.rows]
        return float((under[ends] > under[ends - self.lengths[self.rows]]).double().mean())

    def share_over(self) -> float:
        """The share of the trained records' target tokens that was over the line."""
        return 1 - self.n_under(self.rows.tolist()) / int(self.lengths[self.rows].sum())
