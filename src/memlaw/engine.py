"""The reference training loop: the whole model at every step, and nothing clever.

Shapes: see `forward.py`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from memlaw import objectives
from memlaw.adapters import Adapter
from memlaw.errors import MemlawError
from memlaw.forward import collate, target_logits
from memlaw.objectives import Objective, OnEmpty
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
        wall_s: seconds the epoch took.
    """

    epoch: int
    nll_nats: float
    n_under: int
    n_records_over: int
    n_steps: int
    rank: int
    wall_s: float


class DivergedError(MemlawError):
    """The loss or its gradient is not a number any more."""

    exit_code = 1


class PlainEngine:
    """Trains an adapter on examples, an epoch a call.

    Weights and optimiser state are float32 whatever the model's dtype. An epoch depends only on
    `state()` at its start, so training that is stopped and restored goes on as if it hadn't been.

    Args:
        model: frozen, in eval mode.
        adapter: on the model's device; trained in place.
        examples: what to learn.
        config: how.
    """

    def __init__(
        self, model: Any, adapter: Adapter, examples: Sequence[Example], config: TrainConfig
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.examples = examples
        self.config = config
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
        with self.adapter.attached(self.model):
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
            wall_s=time.perf_counter() - started,
        )

    def _step(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """One step on the records `rows`; returns nll [B, T] from before it, and the mask."""
        batch = collate([self.examples[row] for row in rows], self.device)
        logits = target_logits(self.model, batch).float()  # [N, V]
        flat_nll = F.cross_entropy(logits, batch.target_ids, reduction="none")  # [N]
        with torch.no_grad():
            nll = batch.unflatten(flat_nll.detach())
            correct = batch.unflatten(logits.argmax(dim=-1) == batch.target_ids)
            weights, self.objective_state = self._weigh(rows, nll, correct, batch.target_mask)
            flat_weights = weights[batch.target_mask]
        if not torch.isfinite(flat_nll.detach()).all():
            raise self._diverged("loss")
        if flat_weights.sum() == 0:
            return nll, batch.target_mask
        loss = (flat_weights * flat_nll).sum() / flat_weights.sum()
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), self.config.max_grad_norm)
        if not torch.isfinite(norm):
            raise self._diverged("gradient")
        self.optimizer.step()
        self.n_steps += 1
        return nll, batch.target_mask

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
            "objective_state": dict(self.objective_state),
        }
        return {k: v.detach().clone() for k, v in tensors.items()}, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go back to what `state()` returned."""
        if values["rank"] != self.adapter.rank:
            self.adapter = self.adapter.grown(values["rank"])
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
        self.goal_p, self.objective_state = values["goal_p"], values["objective_state"]


def stats_json(stats: EpochStats) -> dict[str, Any]:
    """For the training curve in `run.json`."""
    return asdict(stats)
