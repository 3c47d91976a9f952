"""Training objectives: which target tokens the next step is spent on.

An objective turns what the model makes of each target token into a weight. The loss of a step is
`Σ weight · nll / Σ weight`; weights that are all zero mean that the step is skipped.

Shapes: B records, T target tokens (padded; `mask` is True on real ones).
Source of sft and the three of MemFT: arXiv 2605.30260; its names for them stand in each
docstring. `triage` is ours; what it gave stands in docs/memft.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from memlaw.settings.choices import OnEmpty

Tensor = torch.Tensor
State = Mapping[str, Any]  # what an objective carries from call to call; JSON-able, never mutated

WINDOW_TOKENS = 50
WINDOW_DECAY_TOKENS = 20.0
WINDOW_FAR_WEIGHT = 0.01
WINDOW_SHARPNESS = 10.0
WINDOW_PATIENCE = 3
WINDOW_GROWTH = 0.5
WINDOW_MAX_GROWTH = 4.0
CURRICULUM_SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
TRIAGE_SHARPNESS = 10.0
TRIAGE_FROM = 0.2  # of the training: before, nobody knows what can be finished


def sft(nll: Tensor, correct: Tensor, mask: Tensor, state: State) -> tuple[Tensor, State]:
    """Supervised fine-tuning: weight 1 on every target token.

    Args:
        nll: [B, T] float, nats, ≥ 0: negative log-likelihood of each target token.
        correct: [B, T] bool: the target token is the argmax.
        mask: [B, T] bool: real target tokens.
        state: returned as it is.

    Returns:
        weights [B, T] float32 ≥ 0, zero outside the mask; and the state.
    """
    return mask.float(), state


def memft_threshold(
    nll: Tensor,
    correct: Tensor,
    mask: Tensor,
    state: State,
    *,
    threshold: float = 0.5,
    on_empty: OnEmpty = "skip",
) -> tuple[Tensor, State]:
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
    nll: Tensor,
    correct: Tensor,
    mask: Tensor,
    state: State,
    *,
    record_ids: list[str],
    threshold: float = 0.5,
) -> tuple[Tensor, State]:
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
    nll: Tensor,
    correct: Tensor,
    mask: Tensor,
    state: State,
    *,
    ranks: Tensor,
    n_records: int,
    epoch: int,
    boundaries: tuple[int, ...],
    threshold: float = 0.5,
) -> tuple[Tensor, State]:
    """`memft_threshold` (skipping empty steps) on a growing share of the records.

    20, 40, 60, 80, then 100 % of a once-shuffled list; the share grows when `epoch` reaches each
    boundary. The paper's MemFT-SW on PhoneBook (`memft_curriculum`).

    Args:
        nll, correct, mask, state: as for `sft`.
        ranks: [B] int: each record's place in the shuffled list, in [0, n_records).
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


def triage(
    nll: Tensor,
    correct: Tensor,
    mask: Tensor,
    state: State,
    *,
    admitted: Tensor,
    threshold: float = 0.5,
) -> tuple[Tensor, State]:
    """What can still be finished, and of it mostly what isn't safe yet.

    `sigmoid(10·(nll + ln p₁))`, p₁ a quarter of the way from the threshold to 1, on the first
    `admitted` tokens of each record: a token under the line weighs about 1, one at p₁ a half, one
    that is certain next to nothing. Which tokens are admitted is `admit`'s to say.

    Args:
        nll, correct, mask, state: as for `sft`.
        admitted: [B] int: how many of a record's tokens are to be learnt, from its beginning.
        threshold: in (0, 1).

    Returns:
        weights [B, T] float32 in [0, 1], and the state, unchanged.
    """
    safe_p = threshold + (1 - threshold) / 4
    weights = torch.sigmoid(TRIAGE_SHARPNESS * (nll.float() + math.log(safe_p)))
    among = torch.arange(nll.shape[1], device=nll.device) < admitted[:, None]
    return torch.where(mask & among, weights, torch.zeros_like(weights)), state


def admit(
    shortfall: Tensor,
    lengths: Tensor,
    *,
    over: float,
    over_at_start: float,
    progress: float,
) -> Tensor:
    """How much of each record `triage` trains: as much in all as is on course to be finished.

    Learning starts slowly and then speeds up: on course to have all over the line in the end is
    who has a share s² of it there after a share s of the training. If it is L instead, L / s² is
    what to expect, and so many tokens are admitted: whole records first, those with the least
    shortfall before the others; of the first that doesn't fit, its beginning. Never fewer than the
    share 1 − s of the time that is left, though, and in the first fifth everything.

    Args:
        shortfall: [R] float ≥ 0: what each record's tokens lack in all, in nats.
        lengths: [R] int: target tokens of each record.
        over: share of all target tokens over the line, in [0, 1].
        over_at_start: what it was before training.
        progress: share of the training that is over, in [0, 1].

    Returns:
        [R] int: admitted tokens of each record, from its beginning; at least one in all.
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
