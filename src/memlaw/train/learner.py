"""What is being trained: an adapter with its optimiser, its objective and its place in the data.

Shapes: B records, T target tokens of the longest record, N target tokens of the batch
(flattened, record after record).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from memlaw.core.errors import ConfigError, MemlawError
from memlaw.data.records import Example
from memlaw.model.adapter import Adapter
from memlaw.model.forward import unflatten
from memlaw.settings.train import TrainConfig, step_size
from memlaw.train import objectives
from memlaw.train.precondition import Statistics, retention_penalty

Tensor = torch.Tensor
_LEAST_RATE_SHARE = 0.1
_LEAST_P = 1e-8  # float16 knows no smaller one
_LEAST_TOKENS = 1000  # of the records, that retention is weighed against


class DivergedError(MemlawError):
    """The loss or its gradient is not a number any more."""

    exit_code = 1


class Learner:
    """An adapter in training.

    Weights and optimiser state are float32 whatever the model's dtype. An epoch depends only on
    `state()` at its start, so training that is stopped and restored goes on as if it hadn't been.

    Args:
        adapter: on the model's device; trained in place.
        examples: those of the engine that it trains with.
        config: how to train.
        statistics: of the adapter's sites; needed where `config.retention` is above 0.
        rows: which of the examples it learns; default: all.
        max_epochs: how long training may take, where `config.total_steps` doesn't say it; what
            triage goes by.

    Attributes:
        seen_p: [target tokens of all examples] float16, record after record: the probability that
            the current or last epoch found for each; 0 where it hasn't looked.
    """

    def __init__(
        self,
        adapter: Adapter,
        examples: Sequence[Example],
        config: TrainConfig,
        statistics: Sequence[Statistics] = (),
        rows: Sequence[int] | None = None,
        max_epochs: int | None = None,
    ) -> None:
        self.adapter = adapter
        self.examples = examples
        self.rows = torch.tensor(range(len(examples)) if rows is None else rows)
        self.config = config
        self.statistics = [_whitened(s, adapter, i) for i, s in enumerate(statistics)]
        if config.retention and not statistics:
            raise ConfigError("retention needs the statistics of the adapter's sites.")
        self.retention = config.retention
        lengths = [len(e.target_ids) for e in examples]
        self._lengths = torch.tensor(lengths)
        self._token_ends = self._lengths.cumsum(0)
        self.seen_p = torch.zeros(sum(lengths), dtype=torch.float16)
        n_tokens = sum(lengths[row] for row in self.rows.tolist())
        self.n_retained_against = max(n_tokens, _LEAST_TOKENS)
        self.batch_size = step_size(config.batch_size, len(self.rows))
        self.device = adapter.a[0].device
        self.epoch = 0
        self.max_epochs = max_epochs
        self._admitted: Tensor | None = None  # in the current epoch, once it is known
        self.over_at_start: float | None = None  # share of target tokens over the line
        self.n_steps = 0
        self.n_looks = 0  # batches seen, skipped steps among them
        self.weighted_share = 1.0  # of the last batch's tokens
        self.rate_share = 1.0  # of the learning rate, in the current epoch
        self.objective_state: objectives.State = {}
        # MemFT aims one margin beyond what the certificate asks: rounding differs between
        # batches, and a token that sits on the line would pass here and fail there.
        self.goal_p = min(config.threshold + 2 * config.margin, (1 + self.certified_p) / 2)
        self.line_p = self.certified_p  # over it, training counts a token as done
        self.optimizer = self._new_optimizer()
        places = torch.empty(len(examples), dtype=torch.long)
        places[self.rows] = torch.randperm(len(self.rows), generator=self._generator(-1))
        self.curriculum_ranks = places.to(self.device)  # [examples] place in the shuffled list

    @property
    def certified_p(self) -> float:
        """The probability that a token needs for the certificate."""
        return self.config.threshold + self.config.margin

    @property
    def is_dense(self) -> bool:
        """Most tokens will have a weight in the next step, as far as is known."""
        return self.config.objective == "sft" or self.weighted_share > 0.5

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.adapter.parameters(),
            lr=self.config.learning_rate,
            betas=self.config.betas,
            weight_decay=0.0,
        )

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch + 1)

    # ------------------------------------------------------------ a step

    def batches(self) -> list[list[int]]:
        """The rows of this epoch's steps: every record once, batches of nearly equal size.

        With triage, every record that is admitted.
        """
        rows = self.rows[self.admitted()[self.rows] > 0]
        order = torch.randperm(len(rows), generator=self._generator(self.epoch))
        n_batches = -(-len(order) // self.batch_size)
        return [rows[part].tolist() for part in torch.tensor_split(order, n_batches)]

    def admitted(self) -> Tensor:
        """[examples] int: how many of each one's target tokens this epoch trains."""
        if self._admitted is None:
            self._admitted = self._admit()
        return self._admitted

    def _admit(self) -> Tensor:
        if self.config.objective != "triage" or self.over_at_start is None:
            return self._lengths
        p = self.seen_p.float()
        shortfall = (math.log(self.goal_p) - p.clamp(min=_LEAST_P).log()).clamp(min=0)
        of_records = torch.stack([part.sum() for part in shortfall.split(self._lengths.tolist())])
        admitted = torch.zeros_like(self._lengths)
        admitted[self.rows] = objectives.admit(
            of_records[self.rows],
            self._lengths[self.rows],
            over=self.share_over(),
            over_at_start=self.over_at_start,
            progress=self.progress,
        )
        return admitted

    @property
    def progress(self) -> float:
        """The share of its training that is over; 0 where no end is set."""
        if self.config.total_steps is not None:
            return min(1.0, self.n_looks / self.config.total_steps)
        return 0.0 if self.max_epochs is None else min(1.0, self.epoch / self.max_epochs)

    def share_over(self) -> float:
        """The share of its target tokens that was over the line when last seen."""
        return 1 - self.n_under(self.rows.tolist()) / int(self._lengths[self.rows].sum())

    def n_under(self, rows: Sequence[int]) -> int:
        """Target tokens of the records `rows` that were under the line when last seen."""
        ends = self._token_ends.tolist()
        return sum(
            int((self.seen_p[ends[row] - int(self._lengths[row]) : ends[row]] < self.line_p).sum())
            for row in rows
        )

    def target_mask(self, rows: Sequence[int]) -> Tensor:
        """[B, T] bool: real target tokens of the records `rows`."""
        lengths = torch.tensor([len(self.examples[row].target_ids) for row in rows])
        return (torch.arange(int(lengths.max())) < lengths[:, None]).to(self.device)

    def weigh(self, rows: list[int], nll: Tensor, correct: Tensor) -> Tensor:
        """What each target token counts in the step on `rows`.

        Args:
            rows: the batch.
            nll: [N] nats.
            correct: [N] bool: the target is the argmax.

        Returns:
            [N] float32 ≥ 0; their sum is 1, or 0 where the step is to be skipped.

        Raises:
            DivergedError: a loss isn't finite.
        """
        self.n_looks += 1
        if not torch.isfinite(nll).all():
            raise self._diverged("loss")
        mask = self.target_mask(rows)
        weights, self.objective_state = self._objective(rows)(
            unflatten(nll, mask), unflatten(correct, mask), mask, self.objective_state
        )
        flat = weights[mask]
        self.weighted_share = float((flat != 0).float().mean())
        return flat / flat.sum().clamp(min=torch.finfo(flat.dtype).tiny)

    def see(self, rows: Sequence[int], nll: Tensor) -> int:
        """Note what an epoch found: `seen_p` of the records `rows`, from their [N] nll.

        Returns:
            How many of the tokens fell back under the line since they were last seen.
        """
        ends = self._token_ends[list(rows)].tolist()
        found = torch.exp(-nll.detach()).to("cpu", torch.float16)
        parts = found.split([len(self.examples[row].target_ids) for row in rows])
        n_relapses = 0
        for end, part in zip(ends, parts, strict=True):
            before = self.seen_p[end - len(part) : end]
            n_relapses += int(((before >= self.line_p) & (part < self.line_p)).sum())
            self.seen_p[end - len(part) : end] = part
        return n_relapses

    def step(self) -> None:
        """Move the weights along the gradients that are there, and the retention penalty's.

        Raises:
            DivergedError: the gradient isn't finite. The adapter is as it was.
        """
        if self.retention:
            (self.retention / self.n_retained_against * self.penalty()).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), self.config.max_grad_norm)
        if not torch.isfinite(norm):
            raise self._diverged("gradient")
        share = self.rate_share
        if self.config.total_steps is not None:
            share *= max(0.0, 1 - (self.n_looks - 1) / self.config.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * share
        self.optimizer.step()
        self.n_steps += 1

    def end_epoch(self, nll_nats: float) -> None:
        """Count the epoch, and set the learning rate for the next one.

        Args:
            nll_nats: mean loss of this one.
        """
        self.epoch += 1
        self._admitted = None
        if self.over_at_start is None:
            self.over_at_start = self.share_over()
        if self.config.schedule == "loss":
            self.rate_share = min(1.0, max(_LEAST_RATE_SHARE, nll_nats**0.5))

    def penalty(self) -> Tensor:
        """The retention penalty: about the nats a token that general text pays; with a graph."""
        if not self.statistics:
            return torch.zeros((), device=self.device)
        return retention_penalty(
            self.statistics, list(zip(self.adapter.a, self.adapter.b, strict=True))
        )

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"the {what} is not finite at step {self.n_steps + 1} (epoch {self.epoch + 1}). "
            f"Try a learning rate under {self.config.learning_rate:g}."
        )

    def _objective(self, rows: list[int]) -> Callable[..., tuple[Tensor, objectives.State]]:
        config = self.config
        if config.objective == "sft":
            return objectives.sft
        if config.objective == "memft_threshold":
            return functools.partial(
                objectives.memft_threshold, threshold=self.goal_p, on_empty=config.on_empty
            )
        if config.objective == "memft_window":
            return functools.partial(
                objectives.memft_window,
                threshold=self.goal_p,
                record_ids=[self.examples[row].record.id for row in rows],
            )
        if config.objective == "triage":
            return functools.partial(
                objectives.triage,
                threshold=self.goal_p,
                admitted=self.admitted()[rows].to(self.device),
            )
        return functools.partial(
            objectives.memft_curriculum,
            threshold=self.goal_p,
            epoch=self.epoch,
            boundaries=config.curriculum_epochs,
            n_records=len(self.rows),
            ranks=self.curriculum_ranks[rows],
        )

    # ------------------------------------------------------------ changes on the way

    def raise_goal(self) -> None:
        """Aim higher: the audit failed where training saw success."""
        self.line_p, self.goal_p = self.goal_p, (self.goal_p + 1) / 2

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
        tensors["seen_p"] = self.seen_p
        values = {
            "epoch": self.epoch,
            "n_steps": self.n_steps,
            "n_looks": self.n_looks,
            "weighted_share": self.weighted_share,
            "over_at_start": self.over_at_start,
            "rank": self.adapter.rank,
            "goal_p": self.goal_p,
            "line_p": self.line_p,
            "rate_share": self.rate_share,
            "retention": self.retention,
            "objective_state": dict(self.objective_state),
        }
        return {k: v.detach().clone() for k, v in tensors.items()}, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go back to what `state()` returned."""
        if values["rank"] != self.adapter.rank:
            at = self.adapter
            self.adapter = Adapter(
                at.sites,
                rank=values["rank"],
                seed=at.seed,
                whiteners=at.whiteners,
                dropout=at.dropout,
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
        self.n_looks, self.weighted_share = values["n_looks"], values["weighted_share"]
        self.retention, self.rate_share = values["retention"], values["rate_share"]
        self.line_p, self.over_at_start = values["line_p"], values["over_at_start"]
        self.seen_p, self._admitted = tensors["seen_p"].clone(), None
        self.goal_p, self.objective_state = values["goal_p"], values["objective_state"]


def _whitened(statistics: Statistics, adapter: Adapter, site: int) -> Statistics:
    """The statistics of what A is trained on: `x W` instead of x, where there is a whitener."""
    if not adapter.whiteners:
        return statistics
    whitener = adapter.whiteners[site]
    return dataclasses.replace(
        statistics, general_in=whitener.apply(statistics.general_in.T).T.contiguous()
    )
