"""The settings of training an adapter."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from memlaw.core.criterion import Criterion
from memlaw.settings.choices import Objective, OnEmpty

_LEAST_RECORDS, _MOST_RECORDS = 10, 100  # a step, where the batch size is left to us


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of the training; `write` and `probe` use them.

    Attributes:
        objective: how the loss weights target tokens. sft: all alike; memft_threshold,
            memft_window, memft_curriculum: as in the MemFT paper, those not learnt yet; triage:
            those that can still be learnt before training ends, whole records first.
        on_empty: what memft_threshold does with a batch whose tokens are all learnt: skip the
            step, or train it with sft.
        curriculum_epochs: the four epochs at which memft_curriculum adds a fifth of the records.
        threshold: a certified token has p ≥ threshold + margin; any token with p > 0.5 is the
            argmax. In [0.5, 1).
        margin: how far above the threshold, against rounding; threshold + margin < 1.
        learning_rate: learning rate of AdamW, at its highest.
        schedule: of the learning rate. loss: times the square root of the last epoch's mean loss
            in nats, kept within 0.1 to 1 (with specificity 0.3 to 1), so it falls as the loss
            does, without a fixed number of steps; linear: falls to 0 in total_steps steps;
            constant.
        total_steps: number of steps in which the linear schedule falls to 0.
        betas: decay rates of AdamW's two moment estimates; with schedule loss and without
            specificity the second one never falls (AMSGrad), but in updates of what is written.
        batch_size: records per step, at most; auto is a tenth of the records, from 10 to 100.
        max_grad_norm: gradients are clipped to this norm.
        dropout: dropout rate on the adapter's output in training, in [0, 1).
        whiten: train the LoRA matrix A in whitened coordinates, in which its inputs are nearly
            isotropic.
        whiten_mixture: share of general text, the rest being records, in the second moments that
            whitening uses; in [0, 1].
        whiten_damping: added to each direction's second moment, in units of their mean.
        retention: weight of the KL penalty on general text, in target tokens: retention / n times
            the KL in nats per token is added to the mean loss, n the number of the records' target
            tokens (fewer than 1,000 count as 1,000). 0 turns it off; training that is stuck
            lowers it.
        seed: random seed of record order and adapter initialisation.
    """

    objective: Objective = "triage"
    on_empty: OnEmpty = "skip"
    curriculum_epochs: tuple[int, int, int, int] = (20, 40, 60, 80)
    threshold: float = 0.5
    margin: float = 0.05
    learning_rate: float = 1e-2
    schedule: Literal["loss", "constant", "linear"] = "loss"
    total_steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    batch_size: int | Literal["auto"] = "auto"
    max_grad_norm: float = 1.0
    dropout: float = 0.0
    whiten: bool = True
    whiten_mixture: float = 0.9
    whiten_damping: float = 0.01
    retention: float = 150_000.0
    seed: int = 0

    @property
    def criterion(self) -> Criterion:
        """What a certified token needs."""
        return Criterion(self.threshold, self.margin)

    def identity(self) -> dict[str, Any]:
        """What decides a result, by name.

        A setting that is younger than the first stored results is left out at its default, so that
        their names stay as they are.
        """
        return {
            f.name: value
            for f in fields(TrainConfig)
            if (value := getattr(self, f.name)) != f.default or f.name in _FIRST
        }


_FIRST = frozenset(  # settings that stored results have always named
    (
        *("objective", "on_empty", "curriculum_epochs", "threshold", "margin", "learning_rate"),
        *("schedule", "total_steps", "betas", "batch_size", "max_grad_norm", "dropout", "whiten"),
        *("whiten_mixture", "whiten_damping", "retention", "seed"),
    )
)


def step_size(
    batch_size: int | Literal["auto"], n_records: int, *, specificity: bool = False
) -> int:
    """Records per step, at most: `batch_size`, or what auto makes of `n_records`.

    Beside negatives a step is dear, and records are told apart in larger ones.
    """
    if batch_size != "auto":
        return batch_size
    if specificity:
        least, share = (_LEAST_RECORDS if n_records <= 20 else 20), 5
    else:
        least, share = _LEAST_RECORDS, 10
    return min(_MOST_RECORDS, max(least, -(-n_records // share)))
