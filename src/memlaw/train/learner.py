"""What is being trained: an adapter with its solver, its objective and its place in the data.

Shapes: R records, B of them in a step, T target tokens of the longest one, N target tokens of the
step (flattened, record after record), M positions that it holds to the bare model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from memlaw.core.errors import MemlawError
from memlaw.data.record import Example
from memlaw.model.adapter import Adapter
from memlaw.model.forward import unflatten
from memlaw.settings.choices import resolve_objective
from memlaw.settings.train import TrainConfig, step_size
from memlaw.train.forgetting import Forgetting
from memlaw.train.holding import Holding
from memlaw.train.keeping import Keeping
from memlaw.train.learner_state import restore, state_of
from memlaw.train.objective import Situation, Step
from memlaw.train.objectives import OBJECTIVES
from memlaw.train.retention import Retention, Term
from memlaw.train.schedule import Schedule
from memlaw.train.seen import Seen
from memlaw.train.solver import Solver

RAISE = 1 / 4  # of the way to certainty that the line moves up behind an audit that failed


class DivergedError(MemlawError):
    """The loss or its gradient is not a number any more."""

    exit_code = 1


class Learner:
    """An adapter in training.

    Weights and solver state are float32 whatever the model's dtype. An epoch depends only on
    `state()` at its start, so training that is stopped and restored goes on as if it hadn't been.

    Args:
        adapter: on the model's device; trained in place.
        examples: those of the engine that it trains with.
        config: how to train.
        terms: of the retention penalty; needed where `config.retention` is above 0.
        rows: which of the examples it learns; default: all.
        max_epochs: when training ends, where `config.total_steps` doesn't say it; for triage.
        holding: what holds the model to its base beside the records, if anything does.

    Attributes:
        seen: what training has seen of each target token.
        objective: which tokens the steps are spent on.
        retention: the penalty on what the adapter does to general text, and its weight.
        goal_p: the probability that training aims at for a token.
        from_nothing: it doesn't start from an earlier training.
        epoch, n_steps, n_looks: epochs, optimiser steps, and batches done (skipped ones, too).
        weighted_share: of the last batch's tokens.
        keeping: of an update: what holds the records that aren't trained, if anything does.
        forgetting: of an update: what is forgotten, if anything is.
    """

    def __init__(
        self,
        adapter: Adapter,
        examples: Sequence[Example],
        config: TrainConfig,
        terms: Sequence[Term] = (),
        rows: Sequence[int] | None = None,
        max_epochs: int | None = None,
        holding: Holding | None = None,
    ) -> None:
        self.adapter, self.examples, self.config = adapter, examples, config
        self.device = adapter.a[0].device
        self.rows = torch.tensor(range(len(examples)) if rows is None else rows)
        lengths = [len(e.target_ids) for e in examples]
        self.seen = Seen(lengths, self.rows, line_p=config.criterion.line)
        if config.margin and config.total_steps is None:
            self.goal_p = beyond(self.seen.line_p)
        else:  # as published; and where the rate goes to 0, tokens stay where they are
            self.goal_p = min(config.threshold + 2 * config.margin, (1 + self.seen.line_p) / 2)
        n_targets = int(self.seen.lengths[self.rows].sum())
        n_parts = holding.recipe.retention_parts if holding else 1
        self.retention = Retention(config.retention, terms, adapter, n_targets, n_parts)
        self.holding = holding
        self.from_nothing = True
        self.keeping: Keeping | None = None
        self.forgetting: Forgetting | None = None
        self.max_epochs = max_epochs
        self.epoch = self.n_steps = self.n_looks = 0
        self.weighted_share = 1.0
        self.schedule = (
            Schedule(config, holding.recipe.least_rate_share) if holding else Schedule(config)
        )
        self.objective = OBJECTIVES[resolve_objective(config.objective)](config)
        self.solver = self.new_solver()
        self._admitted: Tensor | None = None  # in the current epoch, once it is known
        self.train_on(self.rows.tolist())

    def train_on(self, rows: Sequence[int]) -> None:
        """Learn these of the examples from now on, at least one."""
        self.rows = self.seen.rows = torch.tensor(list(rows))
        self.batch_size = step_size(
            self.config.batch_size, len(self.rows), specificity=self.holding is not None
        )
        places = torch.empty(len(self.examples), dtype=torch.long)
        places[self.rows] = torch.randperm(len(self.rows), generator=self._generator(-1))
        self.places = places.to(self.device)  # [examples] in the once-shuffled list
        self._admitted = None

    def start_from(
        self, factors: Sequence[tuple[Tensor, Tensor]], memory: Mapping[str, Tensor]
    ) -> None:
        """Start with the weights and the optimiser's memory of an earlier training.

        Args:
            factors: of each site A [D_in, R] and B [R, D_out], whitening applied.
            memory: as `Solver.state` gave it; what doesn't fit is left out.
        """
        self.from_nothing = False
        self.adapter = self.adapter.fresh(factors[0][0].shape[1])
        self.adapter.put([(a.to(self.device), b.to(self.device)) for a, b in factors])
        self.solver = self.new_solver()
        self.solver.restore(memory)

    def new_solver(self) -> Solver:
        """One that has taken no step yet.

        Where the rate follows the loss, second moments must not fall: with those that do, steps get
        larger as the last tokens are learnt, and what was learnt has come undone. Not so in a
        training that starts from an earlier one, which takes longer with it; nor where other
        answers are held, of which more change (LOG.md, 2026-11-28).
        """
        amsgrad = self.config.schedule == "loss" and self.from_nothing and self.holding is None
        return Solver(self.adapter, self.config, amsgrad=amsgrad)

    @property
    def is_dense(self) -> bool:
        """Most tokens will have a weight in the next step, as far as is known."""
        return self.objective.is_dense or self.weighted_share > 0.5

    @property
    def progress(self) -> float:
        """The share of its training that is over, in [0, 1]; 0 where no end is set."""
        if self.config.total_steps is not None:
            return min(1.0, self.n_looks / self.config.total_steps)
        return 0.0 if self.max_epochs is None else min(1.0, self.epoch / self.max_epochs)

    @property
    def push(self) -> float:
        """What retention is multiplied by."""
        return self.holding.push if self.holding else 1.0

    @property
    def retention_weight(self) -> float:
        """Of the retention penalty, in tokens of general text."""
        return self.push * self.retention.weight

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch + 1)

    def _situation(self) -> Situation:
        return Situation(
            seen=self.seen, epoch=self.epoch, progress=self.progress, goal_p=self.goal_p
        )

    def batches(self) -> list[list[int]]:
        """The rows of this epoch's steps: every record that the objective admits, once.

        Batches are of nearly equal size.
        """
        rows = self.rows[self.admitted()[self.rows] > 0]
        order = torch.randperm(len(rows), generator=self._generator(self.epoch))
        return [rows[part].tolist() for part in torch.tensor_split(order, self.n_batches)]

    @property
    def n_batches(self) -> int:
        """How many steps this epoch has."""
        n_admitted = int((self.admitted()[self.rows] > 0).sum())
        return -(-n_admitted // self.batch_size)

    def admitted(self) -> Int64[Tensor, "examples"]:
        """How many of each one's target tokens this epoch trains."""
        if self._admitted is None:
            self._admitted = self.objective.admit(self._situation())
        return self._admitted

    def weigh(
        self, rows: list[int], nll: Float32[Tensor, "N"], correct: Bool[Tensor, "N"]
    ) -> Float32[Tensor, "N"]:
        """What each target token counts in the step on `rows`.

        Args:
            rows: the batch.
            nll: nats.
            correct: the target is the argmax.

        Returns:
            Numbers ≥ 0; their sum is 1, or 0 where the step is to be skipped. With a `holding` it
            may be more: stubborn tokens weigh more, and the others no less.

        Raises:
            DivergedError: a loss isn't finite.
        """
        self.n_looks += 1
        if not torch.isfinite(nll).all():
            raise _diverged(self, "loss")
        mask = self.seen.mask(rows).to(self.device)
        step = Step(
            record_ids=[self.examples[row].record.id for row in rows],
            places=self.places[rows],
            admitted=self.admitted()[rows].to(self.device),
            nll=unflatten(nll, mask),
            correct=unflatten(correct, mask),
            mask=mask,
        )
        weights = self.objective.weigh(step, self._situation())
        if self.holding and self.holding.active:
            weights[:, 0] *= self.holding.recipe.first
        flat = weights[mask]
        self.weighted_share = float((flat != 0).float().mean())
        flat = flat / flat.sum().clamp(min=torch.finfo(flat.dtype).tiny)
        if self.holding and self.holding.focus is not None:
            flat = flat * self.holding.focus[self.seen.places(rows)].to(flat)
        return flat

    def draw_held(self) -> list[int]:
        """The rows that the next step holds to the bare model, among the engine's examples."""
        held = self.holding.draw(self.n_looks) if self.holding else []
        return held + (self.forgetting.draw(self.n_looks) if self.forgetting else [])

    def weigh_held(self, rows: list[int], kl: Float32[Tensor, "M"]) -> Float32[Tensor, "M"]:
        """What the KL at each position of `rows`, in nats, counts in the step."""
        if self.forgetting is None:
            return self.holding.weigh(rows, kl) if self.holding else kl
        mine = [row for row in rows if row in self.forgetting.lengths]  # they stand last
        n = sum(self.forgetting.lengths[row] for row in mine)
        others, at_mine = kl.split([len(kl) - n, n])
        if self.holding and len(mine) < len(rows):
            others = self.holding.weigh(rows[: len(rows) - len(mine)], others)
        return torch.cat([others, self.forgetting.weigh(mine, at_mine)])

    def pushed(self, held: list[int]) -> list[int]:
        """Of the rows that a step holds, those whose targets are to become less likely."""
        return self.forgetting.pushable(held) if self.forgetting else []

    def weigh_pushed(self, rows: list[int], nll: Float32[Tensor, "N"]) -> Float32[Tensor, "N"]:
        """What the loss of each target token of pushed rows counts: 0 or less."""
        return self.forgetting.push(rows, nll) if self.forgetting else nll

    def step(self) -> None:
        """Move the weights along the gradients that are there, and the retention penalty's.

        Raises:
            DivergedError: the gradient isn't finite. The adapter is as it was.
        """
        if self.retention.weight:
            (self.push * self.retention.loss(self.adapter, self.n_steps)).backward()
        if self.holding and self.holding.active:
            self.holding.penalty(self.adapter, self.n_steps).backward()
        if self.keeping:
            self.keeping.loss(self.adapter).backward()
            self.keeping.hold_still(self.adapter)
        if not self.solver.clip():
            raise _diverged(self, "gradient")
        rate = self.schedule.at(self.n_looks - 1)
        if self.holding:
            rate *= self.holding.rate
        if self.keeping:
            rate *= self.keeping.rate
        self.solver.step(rate)
        self.n_steps += 1
        if self.holding:
            self.holding.after_step(self.adapter, self.n_batches)

    def end_epoch(self, nll_nats: float) -> None:
        """Count the epoch, and set the learning rate for the next one.

        Args:
            nll_nats: mean loss of this one.
        """
        self.epoch += 1
        self._admitted = None
        if self.seen.over_at_start is None:
            self.seen.over_at_start = self.seen.share_over()
        left = self.forgetting.mean_kl if self.forgetting else 0.0
        self.schedule.after_epoch(max(nll_nats, left))
        if self.holding:
            self.holding.after_epoch(nll_nats)

    def raise_goal(self) -> None:
        """Ask for more, and aim higher: the audit failed where training saw success."""
        self.seen.line_p += RAISE * (1 - self.seen.line_p)
        self.goal_p = beyond(self.seen.line_p)

    def grow(self, rank: int) -> None:
        """Continue with a higher rank: the same function, more room."""
        memory = self.solver.state()
        self.adapter = self.adapter.grown(rank)
        self.solver = self.new_solver()
        self.solver.restore(memory)
        if self.holding:
            self.holding.after_growth()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next epoch depends on: tensors, and JSON-able values. Both are copies."""
        return state_of(self)

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go back to what `state()` returned."""
        restore(self, tensors, values)


def beyond(line_p: float) -> float:
    """The probability that training aims at so that tokens stay over a line.

    A token on the line falls under it with the next steps, which are for others, and by rounding.
    """
    return line_p + (1 - line_p) * 2 / 3


def _diverged(learner: Learner, what: str) -> DivergedError:
    return DivergedError(
        f"the {what} is not finite at step {learner.n_steps + 1} (epoch {learner.epoch + 1}). "
        f"Try a learning rate under {learner.config.learning_rate:g}."
    )
