"""Training: the loop, and the reference way to run a step (the whole model, nothing clever).

Shapes: see `forward.py`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from memlaw import objectives
from memlaw.adapters import Adapter
from memlaw.errors import MemlawError
from memlaw.forward import collate, target_logits, unflatten
from memlaw.objectives import Objective, OnEmpty
from memlaw.precondition import Statistics, retention_penalty
from memlaw.records import Example

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Attributes:
        objective: which tokens the steps are spent on.
        on_empty: what `memft_threshold` does with a batch that has nothing left to learn.
        curriculum_epochs: when `memft_curriculum` admits the next fifth of the records.
        threshold: p that a token needs to be the argmax for certain; in [0.5, 1).
        margin: how far above it a certified token must be; threshold + margin < 1.
        learning_rate: AdamW's, constant.
        batch_size: records a step, at most.
        max_grad_norm: gradients are clipped to this norm.
        whiten: train A in coordinates in which its inputs are nearly isotropic.
        whiten_mixture: share of general text in the second moments that this goes by, in [0, 1].
        whiten_damping: how much of the mean second moment is added in every direction.
        retention: weight of the penalty on what the adapter does to general text, in nats of it
            a token, against nats of the records; 0 turns it off. Lowered when training is stuck.
        seed: of the order of records and of the adapter's initialisation.
    """

    objective: Objective = "sft"
    on_empty: OnEmpty = "skip"
    curriculum_epochs: tuple[int, int, int, int] = (20, 40, 60, 80)
    threshold: float = 0.5
    margin: float = 0.05
    learning_rate: float = 1e-2
    batch_size: int = 10
    max_grad_norm: float = 1.0
    whiten: bool = True
    whiten_mixture: float = 0.9
    whiten_damping: float = 0.01
    retention: float = 10.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class EpochStats:
    """What one epoch saw, each record just before the step it took part in.

    Attributes:
        epoch: epochs done, from 1.
        nll_nats: mean negative log-likelihood of all target tokens.
        n_under: target tokens with p < threshold + margin.
        n_records_over: records with no such token.
        n_steps: optimiser steps done so far, skipped ones not counted.
        rank: the adapter's.
        retention: the weight of the penalty that was trained with.
        wall_s: seconds the epoch took.
    """

    epoch: int
    nll_nats: float
    n_under: int
    n_records_over: int
    n_steps: int
    rank: int
    retention: float
    wall_s: float


class DivergedError(MemlawError):
    """The loss or its gradient is not a number any more."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What a forward pass found, and how to send gradients back from it.

    Attributes:
        nll: [N] float32, nats, without a graph.
        correct: [N] bool: the target is the argmax.
        backward: adds the gradient of `Σ weights · nll`, weights [N], to the adapter's.
    """

    nll: Tensor
    correct: Tensor
    backward: Callable[[Tensor], None]


class PlainEngine:
    """Trains an adapter on examples, an epoch a call.

    Weights and optimiser state are float32 whatever the model's dtype. An epoch depends only on
    `state()` at its start, so training that is stopped and restored goes on as if it hadn't been.

    Args:
        model: frozen, in eval mode.
        adapter: on the model's device; trained in place.
        examples: what to learn.
        config: how.
        statistics: of the adapter's sites; needed where `config.retention` is above 0.
    """

    def __init__(
        self,
        model: Any,
        adapter: Adapter,
        examples: Sequence[Example],
        config: TrainConfig,
        statistics: Sequence[Statistics] = (),
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.examples = examples
        self.config = config
        self.statistics = statistics
        self.retention = config.retention if statistics else 0.0
        self.device = next(model.parameters()).device
        self.epoch = 0
        self.n_steps = 0
        self.objective_state: objectives.State = {}
        # Training aims one margin beyond what the certificate asks: rounding differs between
        # batches, and a token that sits on the line would pass here and fail there.
        self.goal_p = min(config.threshold + 2 * config.margin, (1 + self.certified_p) / 2)
        self.optimizer = self._new_optimizer()
        places = torch.randperm(len(examples), generator=self._generator(-1))
        self.curriculum_ranks = places.to(self.device)  # [records] place in the shuffled list

    @property
    def certified_p(self) -> float:
        """The probability that a token needs for the certificate."""
        return self.config.threshold + self.config.margin

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.adapter.parameters(), lr=self.config.learning_rate, weight_decay=0.0
        )

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch + 1)

    def run_epoch(self) -> EpochStats:
        """Train once on every record, in batches of nearly equal size.

        Raises:
            DivergedError: at the first step whose loss or gradient isn't finite. The adapter is
                then as the step before left it.
        """
        started = time.perf_counter()
        order = torch.randperm(len(self.examples), generator=self._generator(self.epoch))
        n_batches = -(-len(order) // self.config.batch_size)
        nll_sum, n_tokens, n_under, n_over = 0.0, 0, 0, 0
        for rows in torch.tensor_split(order, n_batches):
            nll, mask = self._step(rows.tolist())
            under = mask & (torch.exp(-nll) < self.certified_p)  # [B, T]
            nll_sum += float(nll.sum())
            n_tokens += int(mask.sum())
            n_under += int(under.sum())
            n_over += int((~under.any(dim=1)).sum())
        self.epoch += 1
        return EpochStats(
            epoch=self.epoch,
            nll_nats=nll_sum / n_tokens,
            n_under=n_under,
            n_records_over=n_over,
            n_steps=self.n_steps,
            rank=self.adapter.rank,
            retention=self.retention,
            wall_s=time.perf_counter() - started,
        )

    def _forward(self, rows: list[int]) -> Losses:
        """Losses of the records `rows`, record after record."""
        batch = collate([self.examples[row] for row in rows], self.device)
        with self.adapter.attached(self.model):
            logits = target_logits(self.model, batch).float()  # [N, V]
        nll = F.cross_entropy(logits, batch.target_ids, reduction="none")
        return Losses(
            nll=nll.detach(),
            correct=logits.detach().argmax(dim=-1) == batch.target_ids,
            backward=lambda weights: (weights * nll).sum().backward(),
        )

    def _step(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """One step on the records `rows`; returns nll [B, T] from before it, and the mask."""
        mask = self._target_mask(rows)
        losses = self._forward(rows)
        if not torch.isfinite(losses.nll).all():
            raise self._diverged("loss")
        nll, correct = unflatten(losses.nll, mask), unflatten(losses.correct, mask)
        weights, self.objective_state = self._weigh(rows, nll, correct, mask)
        flat_weights = weights[mask]
        if flat_weights.sum() == 0:
            return nll, mask
        self.optimizer.zero_grad()
        losses.backward(flat_weights / flat_weights.sum())
        if self.retention:
            factors = [self.adapter.factors(i) for i in range(len(self.adapter.sites))]
            (self.retention * retention_penalty(self.statistics, factors)).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), self.config.max_grad_norm)
        if not torch.isfinite(norm):
            raise self._diverged("gradient")
        self.optimizer.step()
        self.n_steps += 1
        return nll, mask

    def _target_mask(self, rows: list[int]) -> Tensor:
        """[B, T] bool: real target tokens of the records `rows`."""
        lengths = torch.tensor([len(self.examples[row].target_ids) for row in rows])
        return (torch.arange(int(lengths.max())) < lengths[:, None]).to(self.device)

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"the {what} is not finite at step {self.n_steps + 1} (epoch {self.epoch + 1}). "
            f"Try a learning rate under {self.config.learning_rate:g}."
        )

    def _weigh(
        self, rows: list[int], nll: Tensor, correct: Tensor, mask: Tensor
    ) -> tuple[Tensor, objectives.State]:
        config = self.config
        weigh: Callable[..., tuple[Tensor, objectives.State]]
        if config.objective == "sft":
            weigh = objectives.sft
        elif config.objective == "memft_threshold":
            weigh = functools.partial(
                objectives.memft_threshold, threshold=self.goal_p, on_empty=config.on_empty
            )
        elif config.objective == "memft_window":
            weigh = functools.partial(
                objectives.memft_window,
                threshold=self.goal_p,
                record_ids=[self.examples[row].record.id for row in rows],
            )
        else:
            weigh = functools.partial(
                objectives.memft_curriculum,
                threshold=self.goal_p,
                epoch=self.epoch,
                boundaries=config.curriculum_epochs,
                n_records=len(self.examples),
                ranks=self.curriculum_ranks[rows],
            )
        return weigh(nll, correct, mask, self.objective_state)

    def raise_goal(self) -> None:
        """Aim halfway from the current goal to 1: the audit failed where training saw success."""
        self.goal_p = (self.goal_p + 1) / 2

    def grow(self, rank: int) -> None:
        """Continue with a higher rank: the same function, more room."""
        before, moments = self.adapter, self._moments()
        self.adapter = before.grown(rank)
        self.optimizer = self._new_optimizer()
        for name, old in moments.items():
            if name.startswith("step"):
                continue
            new = torch.zeros_like(self._parameter(name))
            new[: old.shape[0], : old.shape[1]] = old
            moments[name] = new
        self._set_moments(moments)

    def _parameter(self, name: str) -> Tensor:
        return list(self.adapter.parameters())[int(name.partition(".")[2])]

    def _moments(self) -> dict[str, Tensor]:
        return {
            f"{key}.{i}": self.optimizer.state[parameter][key]
            for i, parameter in enumerate(self.adapter.parameters())
            for key in self.optimizer.state.get(parameter, {})
        }

    def _set_moments(self, moments: Mapping[str, Tensor]) -> None:
        for i, parameter in enumerate(self.adapter.parameters()):
            state = {
                k: moments[f"{k}.{i}"]
                for k in ("step", "exp_avg", "exp_avg_sq")
                if f"{k}.{i}" in moments
            }
            if state:
                self.optimizer.state[parameter] = state

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next epoch depends on: tensors, and JSON-able values. Both are copies."""
        tensors = {f"adapter.{k}": v for k, v in self.adapter.state_dict().items()}
        tensors |= {f"moments.{k}": v for k, v in self._moments().items()}
        values = {
            "epoch": self.epoch,
            "n_steps": self.n_steps,
            "rank": self.adapter.rank,
            "goal_p": self.goal_p,
            "retention": self.retention,
            "objective_state": dict(self.objective_state),
        }
        return {k: v.detach().clone() for k, v in tensors.items()}, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go back to what `state()` returned."""
        if values["rank"] != self.adapter.rank:
            at = self.adapter
            self.adapter = Adapter(
                at.sites, rank=values["rank"], seed=at.seed, whiteners=at.whiteners
            ).to(self.device)
        self.adapter.load_state_dict(
            {k.removeprefix("adapter."): v for k, v in tensors.items() if k.startswith("adapter.")}
        )
        self.optimizer = self._new_optimizer()
        self._set_moments(
            {
                k.removeprefix("moments."): v.to(self.device).clone()
                if "step" not in k
                else v.clone()
                for k, v in tensors.items()
                if k.startswith("moments.")
            }
        )
        self.epoch, self.n_steps = values["epoch"], values["n_steps"]
        self.retention = values["retention"]
        self.goal_p, self.objective_state = values["goal_p"], values["objective_state"]
