"""What an objective is: it says which records an epoch trains, and what their tokens count.

Shapes: R records, B of them in a step, T target tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from memlaw.settings.train import TrainConfig
from memlaw.train.seen import Seen

Tensor = torch.Tensor
State = Mapping[str, Any]  # what an objective carries from call to call; JSON-able, never mutated


@dataclass(frozen=True, kw_only=True)
class Step:
    """The records of a step, as the model sees them just before it.

    Attributes:
        record_ids: B ids.
        places: [B] int64: each one's place in the once-shuffled list of all, in [0, R).
        admitted: [B] int64: how many of its target tokens are trained, see `Objective.admit`.
        nll: [B, T] float32, nats, >= 0.
        correct: [B, T] bool: the target token is the argmax.
        mask: [B, T] bool: real target tokens.
    """

    record_ids: list[str]
    places: Tensor
    admitted: Tensor
    nll: Tensor
    correct: Tensor
    mask: Tensor


@dataclass(frozen=True, kw_only=True)
class Situation:
    """How far training is.

    Attributes:
        seen: what it has seen of each target token.
        n_records: R.
        epoch: the current one, from 0.
        progress: the share of the training that is over, in [0, 1]; 0 where no end is set.
        goal_p: the probability that training aims at for a token.
    """

    seen: Seen
    n_records: int
    epoch: int
    progress: float
    goal_p: float


class Objective:
    """Which tokens the steps are spent on. A new one overrides `weigh`, and what else it needs.

    Args:
        config: how to train.

    Attributes:
        is_dense: it gives most tokens a weight, whatever the model makes of them.
        state: what it carries from epoch to epoch, for checkpoints.
    """

    is_dense = False

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.state: State = {}

    def admit(self, now: Situation) -> Tensor:
        """How many target tokens of each record the coming epoch trains: [R] int64, on the CPU.

        They are counted from the record's beginning; a record with none is left out.
        """
        return now.seen.lengths

    def weigh(self, step: Step, now: Situation) -> Tensor:
        """The weight of each target token: [B, T] float32 >= 0, zero outside the mask.

        The loss of the step is `sum(weight * nll) / sum(weight)`; if all are zero it is skipped.
        """
        raise NotImplementedError
