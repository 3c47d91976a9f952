"""How an adapter is trained."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from memlaw.settings.choices import Objective, OnEmpty

_LEAST_RECORDS, _MOST_RECORDS = 10, 100  # a step, where the batch size is left to us


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Attributes:
        objective: which tokens the steps are spent on.
        on_empty: what `memft_threshold` does with a batch that has nothing left to learn.
        curriculum_epochs: when `memft_curriculum` admits the next fifth of the records.
        threshold: p that a token needs to be the argmax for certain; in [0.5, 1).
        margin: how far above it a certified token must be; threshold + margin < 1.
        learning_rate: AdamW's, at its highest.
        schedule: loss multiplies it by the root of the last epoch's mean loss in nats (0.1 to 1):
            it falls as the end comes near, and needs to know no horizon; linear takes it to 0
            in total_steps steps.
        total_steps: where linear ends.
        betas: AdamW's.
        batch_size: records a step, at most; auto is a tenth of the records, from 10 to 100.
        max_grad_norm: gradients are clipped to this norm.
        dropout: share of what the adapter adds that is dropped in training, in [0, 1).
        whiten: train A in coordinates in which its inputs are nearly isotropic.
        whiten_mixture: share of general text in the second moments that this goes by, in [0, 1].
        whiten_damping: how much of the mean second moment is added in every direction.
        retention: how many tokens of general text stand beside the records' target tokens: the
            penalty on what the adapter does to general text, in nats a token, weighs so many
            times as much as one token of the records (or as a thousandth of them, where there are
            fewer than 1,000). 0 turns it off. Lowered when training is stuck.
        seed: of the order of records and of the adapter's initialisation.
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


def step_size(batch_size: int | Literal["auto"], n_records: int) -> int:
    """Records a step, at most."""
    if batch_size != "auto":
        return batch_size
    return min(_MOST_RECORDS, max(_LEAST_RECORDS, -(-n_records // 10)))
