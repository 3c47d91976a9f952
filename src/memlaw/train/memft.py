"""SFT and the three of MemFT: weights from losses, and the objectives that hold their state.

Shapes: as in `objective.py`. Source: arXiv 2605.30260; its names stand in each docstring.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from memlaw.settings.choices import OnEmpty
from memlaw.train.objective import Objective, Situation, State, Step

WINDOW_TOKENS = 50
WINDOW_DECAY_TOKENS = 20.0
WINDOW_FAR_WEIGHT = 0.01
WINDOW_SHARPNESS = 10.0
WINDOW_PATIENCE = 3
WINDOW_GROWTH = 0.5
WINDOW_MAX_GROWTH = 4.0
CURRICULUM_SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)


def sft(
    nll: Float[Tensor, "B T"],
    correct: Bool[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    state: State,
) -> tuple[Float32[Tensor, "B T"], State]:
    """Supervised fine-tuning: weight 1 on every target token.

    Args:
        nll: nats, ≥ 0: negative log-likelihood of each target token.
        correct: the target token is the argmax.
        mask: real target tokens.
        state: returned as it is.

    Returns:
        weights [B, T] float32 ≥ 0, zero outside the mask; and the state.
    """
    return mask.float(), state


def memft_threshold(
    nll: Float[Tensor, "B T"],
    correct: Bool[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    state: State,
    *,
    threshold: float = 0.5,
    on_empty: OnEmpty = "skip",
) -> tuple[Float32[Tensor, "B T"], State]:
    """Weight 1 on tokens still at or under the threshold: `p ≤ threshold`, p = exp(−nll).

    The paper's MemFT-OT (`only_threshold`).

    Args:
        nll, correct, mask, state: as for `sft`.
        threshold: in (0, 1).
        on_empty: when no token of the batch is left: `skip` the step (the published `zero_bp`),
            or train plain `sft` on the batch (what the published code does by default).

    Returns:
        weights [B, T] float32 in {0, 1}, and the state, unchanged.
    """
    weights = (mask & (nll >= -math.log(threshold))).float()
    if on_empty == "sft" and not weights.any():
        return sft(nll, correct, mask, state)
    return weights, state


def memft_window(
    nll: Float[Tensor, "B T"],
    correct: Bool[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    state: State,
    *,
    record_ids: list[str],
    threshold: float = 0.5,
) -> tuple[Float32[Tensor, "B T"], State]:
    """Soft threshold times a window behind each record's first error.

    `sigmoid(10·(nll + ln threshold))` times, with `a` the first position whose argmax is wrong:
    1 before `a`; `exp(−(t − a)/20)` for `a ≤ t < a + window`; 0.01 behind it; 1 everywhere when
    there is no error. The window is 50 tokens. From the third evaluation in a row that finds
    `a` where it was, it grows by half of that each time, up to four times as long; when `a`
    moves it is 50 again. The paper's MemFT-SW on long context (`sliding`).

    Args:
        nll, correct, mask: as for `sft`.
        state: {record id: [a, how many evaluations in a row found it there again]}.
        record_ids: B ids; patience belongs to a record, not to its place in the batch.
        threshold: in (0, 1).

    Returns:
        weights [B, T] float32 in [0, 1], and the new state.
    """
    soft = torch.sigmoid(WINDOW_SHARPNESS * (nll.float() + math.log(threshold)))
    weights = torch.where(mask, soft, torch.zeros_like(soft))
    after = dict(state)
    for row, record_id in enumerate(record_ids):
        wrong = (mask[row] & ~correct[row]).nonzero()
        if len(wrong) == 0:
            after.pop(record_id, None)
            continue
        anchor = int(wrong[0])
        last_anchor, stays = state.get(record_id, (None, 0))
        stays = stays + 1 if last_anchor == anchor else 0
        after[record_id] = [anchor, stays]
        growth = min(1 + WINDOW_GROWTH * max(0, stays - WINDOW_PATIENCE + 1), WINDOW_MAX_GROWTH)
        behind = torch.arange(nll.shape[1], device=nll.device) - anchor  # [T]
        window = torch.exp(-behind.clamp(min=0) / WINDOW_DECAY_TOKENS)
        window[behind >= WINDOW_TOKENS * growth] = WINDOW_FAR_WEIGHT
        weights[row] *= window
    return weights, after


def memft_curriculum(
    nll: Float[Tensor, "B T"],
    correct: Bool[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    state: State,
    *,
    ranks: Int64[Tensor, "B"],
    n_records: int,
    epoch: int,
    boundaries: tuple[int, ...],
    threshold: float = 0.5,
) -> tuple[Float32[Tensor, "B T"], State]:
    """`memft_threshold` (skipping empty steps) on a growing share of the records.

    20, 40, 60, 80, then 100 % of a once-shuffled list; the share grows when `epoch` reaches each
    boundary. The paper's MemFT-SW on PhoneBook (`memft_curriculum`).

    Args:
        nll, correct, mask, state: as for `sft`.
        ranks: each record's place in the shuffled list, in [0, n_records).
        n_records: how many records there are in all.
        epoch: the current epoch, from 0.
        boundaries: four growing epochs.
        threshold: in (0, 1).

    Returns:
        weights [B, T] float32 in {0, 1}, and the state, unchanged.
    """
    stage = sum(epoch >= boundary for boundary in boundaries)
    admitted = ranks < math.ceil(CURRICULUM_SHARES[stage] * n_records)  # [B]
    return memft_threshold(nll, correct, mask & admitted[:, None], state, threshold=threshold)


class Sft(Objective):
    """Supervised fine-tuning: every target token counts the same."""

    is_dense = True

    def weigh(self, step: Step, now: Situation) -> Float32[Tensor, "B T"]:
        """See `sft`."""
        return sft(step.nll, step.correct, step.mask, {})[0]


class MemftThreshold(Objective):
    """Only tokens that are still under the threshold count."""

    def weigh(self, step: Step, now: Situation) -> Float32[Tensor, "B T"]:
        """See `memft_threshold`."""
        weights, _ = memft_threshold(
            step.nll,
            step.correct,
            step.mask,
            {},
            threshold=now.goal_p,
            on_empty=self.config.on_empty,
        )
        return weights


class MemftWindow(Objective):
    """A window behind each record's first error."""

    def weigh(self, step: Step, now: Situation) -> Float32[Tensor, "B T"]:
        """See `memft_window`; its state is kept."""
        weights, self.state = memft_window(
            step.nll,
            step.correct,
            step.mask,
            self.state,
            record_ids=step.record_ids,
            threshold=now.goal_p,
        )
        return weights


class MemftCurriculum(Objective):
    """The threshold, on a growing share of the records."""

    def weigh(self, step: Step, now: Situation) -> Float32[Tensor, "B T"]:
        """See `memft_curriculum`."""
        weights, _ = memft_curriculum(
            step.nll,
            step.correct,
            step.mask,
            {},
            threshold=now.goal_p,
            ranks=step.places,
            n_records=len(now.seen.rows),
            epoch=now.epoch,
            boundaries=self.config.curriculum_epochs,
        )
        return weights
