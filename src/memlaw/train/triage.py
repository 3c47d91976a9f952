"""Triage: train what can still be finished, whole records first.

Shapes: as in `objective.py`. Source: ours; what it gives stands in docs/memft.md.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from memlaw.train.objective import Objective, Situation, State, Step

TRIAGE_SHARPNESS = 10.0
TRIAGE_FROM = 0.2  # of the training: before, nobody knows what can be finished
_LEAST_P = 1e-8  # float16 knows no smaller one


def triage(
    nll: Float[Tensor, "B T"],
    correct: Bool[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    state: State,
    *,
    admitted: Int64[Tensor, "B"],
    threshold: float = 0.5,
) -> tuple[Float32[Tensor, "B T"], State]:
    """What can still be finished, and of it mostly what isn't safe yet.

    `sigmoid(10·(nll + ln p₁))`, p₁ a quarter of the way from the threshold to 1, on the first
    `admitted` tokens of each record: a token under the line weighs about 1, one at p₁ a half, one
    that is certain next to nothing. Which tokens are admitted is `admit`'s to say.

    Args:
        nll, correct, mask, state: as for `sft`.
        admitted: how many of a record's tokens are to be learnt, from its beginning.
        threshold: in (0, 1).

    Returns:
        weights [B, T] float32 in [0, 1], and the state, unchanged.
    """
    safe_p = threshold + (1 - threshold) / 4
    weights = torch.sigmoid(TRIAGE_SHARPNESS * (nll.float() + math.log(safe_p)))
    among = torch.arange(nll.shape[1], device=nll.device) < admitted[:, None]
    return torch.where(mask & among, weights, torch.zeros_like(weights)), state


def admit(
    shortfall: Float[Tensor, "R"],
    lengths: Int64[Tensor, "R"],
    *,
    over: float,
    over_at_start: float,
    progress: float,
) -> Int64[Tensor, "R"]:
    """How much of each record `triage` trains: as much in all as is on course to be finished.

    Learning starts slowly and then speeds up: on course to have all over the line in the end is
    who has a share s² of it there after a share s of the training. If it is L instead, L / s² is
    what to expect, and so many tokens are admitted: whole records first, those with the least
    shortfall before the others; of the first that doesn't fit, its beginning. Never fewer than the
    share 1 − s of the time that is left, though, and in the first fifth everything.

    Args:
        shortfall: ≥ 0: what each record's tokens lack in all, in nats.
        lengths: target tokens of each record.
        over: share of all target tokens over the line, in [0, 1].
        over_at_start: what it was before training.
        progress: share of the training that is over, in [0, 1].

    Returns:
        Admitted tokens of each record, from its beginning; at least one in all.
    """
    if progress < TRIAGE_FROM or over_at_start >= 1:
        return lengths.clone()
    learnt = max(0.0, (over - over_at_start) / (1 - over_at_start))
    expected = over_at_start + (1 - over_at_start) * learnt / progress**2
    share = min(1.0, max(over, expected, 1 - progress))
    budget = max(1, math.ceil(share * int(lengths.sum()) - 1e-6))  # 2.0000001 is 2
    order = torch.argsort(shortfall, stable=True)
    before = lengths[order].cumsum(0) - lengths[order]
    admitted = torch.zeros_like(lengths)
    admitted[order] = torch.minimum((budget - before).clamp(min=0), lengths[order])
    return admitted


class Triage(Objective):
    """What can still be finished, and of it mostly what isn't safe yet."""

    def admit(self, now: Situation) -> Int64[Tensor, "R"]:
        """See `admit`; everything, before the first epoch is over."""
        seen = now.seen
        if seen.over_at_start is None:
            return seen.lengths
        shortfall = (math.log(now.goal_p) - seen.p.float().clamp(min=_LEAST_P).log()).clamp(min=0)
        of_records = torch.stack([part.sum() for part in shortfall.split(seen.lengths.tolist())])
        admitted = torch.zeros_like(seen.lengths)
        admitted[seen.rows] = admit(
            of_records[seen.rows],
            seen.lengths[seen.rows],
            over=seen.share_over(),
            over_at_start=seen.over_at_start,
            progress=now.progress,
        )
        return admitted

    def weigh(self, step: Step, now: Situation) -> Float32[Tensor, "B T"]:
        """See `triage`."""
        weights, _ = triage(
            step.nll,
            step.correct,
            step.mask,
            {},
            threshold=now.goal_p,
            admitted=step.admitted,
        )
        return weights
