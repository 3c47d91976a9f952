"""What an objective is: it says which records an epoch trains, and what their tokens count.

Shapes: R records, B of them in a step, T target tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from memlaw.settings.train import TrainConfig
from memlaw.train.seen import Seen

State = Mapping[str, Any]  # what an objective carries from call to call; JSON-able, never mutated


@dataclass(frozen=True, kw_only=True)
class Step:
    """The records of a step, as the model sees them just before it.

    Attributes:
        record_ids: B ids.
        places: each one's place in the once-shuffled list of all, in [0, R).
        admitted: how many of its target tokens are trained, see `Objective.admit`.
        nll: nats, ≥ 0.
        correct: the target token is the argmax.
        mask: real target tokens.
    """

    record_ids: list[str]
    places: Int64[Tensor, "B"]
    admitted: Int64[Tensor, "B"]
    nll: Float32[Tensor, "B T"]
    correct: Bool[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]


@dataclass(frozen=True, kw_only=True)
class Situation:
    """How far training is.

    Attributes:
        seen: what it has seen of each target token.
        epoch: the current one, from 0.
        progress: the share of the training that is over, in [0, 1]; 0 where no end is set.
        goal_p: the probability that training aims at for a token.
    """

    seen: Seen
    epoch: int
    progress: float
    goal_p: float


class Objective:
    """Which tokens the steps are spent on. A new one overrides `weigh`, and what else it needs.

    Args:
        config: how to train.

    Attributes:
        is_dense: it gives most tokens a weight, whatever the model makes of them.
        state: what it carries from step to step; a checkpoint keeps it.
    """

    is_dense = False

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.state: State = {}

    def admit(self, now: Situation) -> Int64[Tensor, "R"]:
        """How many target tokens of each record the coming epoch trains; on the CPU.

        They are counted from the record's beginning; a record with none is left out.
        """
        return now.seen.lengths

    def weigh(self, step: Step, now: Situation) -> Float32[Tensor, "B T"]:
        """The weight of each target token: ≥ 0, and zero outside the mask.

        The loss of the step is `sum(weight * nll) / sum(weight)`; if all are zero it is skipped.
        """
        raise NotImplementedError
