"""The training loop: adapters that learn side by side, in one forward pass a step.

Adapters of mixed rank, seed, learning rate, batch size or objective share an engine, and with it
the cache, the reading of the model's weights, and the cost of starting each operation. What one
of them learns doesn't depend on the others.

Example: five ranks on the same records, each until it knows them:
    >>> bank = AdapterBank(engine, learners)  # doctest: +SKIP
    >>> while bank.learners:  # doctest: +SKIP
    ...     for learner, result in zip(list(bank.learners), bank.run_epoch()):
    ...         if isinstance(result, DivergedError) or result.n_under == 0:
    ...             bank.leave(learner)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch.utils.flop_counter import FlopCounterMode

from memlaw.engine import Engine, Job
from memlaw.learner import DivergedError, EpochStats, Learner

Tensor = torch.Tensor


class AdapterBank:
    """Trains learners together, an epoch a call.

    Args:
        engine: what runs the model; its examples are the learners'.
        learners: in any mixture; with different batch sizes some have fewer steps an epoch.

    Attributes:
        learners: those still in training.
    """

    def __init__(self, engine: Engine, learners: Sequence[Learner]) -> None:
        self.engine = engine
        self.learners = list(learners)
        # Counted in the first step; too high where later ones leave out a way back (MemFT).
        self.flop_per_token = 0.0

    def leave(self, learner: Learner) -> None:
        """Train the rest without this one."""
        self.learners.remove(learner)

    def run_epoch(self) -> list[EpochStats | DivergedError]:
        """Train each learner once on every record of its.

        Returns:
            For each learner what it saw; or the error at its first step whose loss or gradient
            wasn't finite, its adapter being as the step before left it. The others go on.
        """
        started, tokens_before = time.perf_counter(), self.engine.n_tokens
        epochs = [_Epoch(learner) for learner in self.learners]
        for rows in zip_longest(*(learner.batches() for learner in self.learners)):
            jobs = [(e, r) for e, r in zip(epochs, rows, strict=True) if r and not e.error]
            if self.flop_per_token:
                self._step(jobs)
            else:
                self._counted_step(jobs)
        n_tokens = self.engine.n_tokens - tokens_before
        wall_s = time.perf_counter() - started
        return [epoch.end(n_tokens, n_tokens * self.flop_per_token, wall_s) for epoch in epochs]

    def _counted_step(self, jobs: Sequence[tuple[_Epoch, list[int]]]) -> None:
        before = self.engine.n_tokens
        with FlopCounterMode(display=False) as counter:
            self._step(jobs)
        self.flop_per_token = counter.get_total_flops() / max(1, self.engine.n_tokens - before)

    def _step(self, jobs: Sequence[tuple[_Epoch, list[int]]]) -> None:
        if not jobs:
            return
        for epoch, _ in jobs:
            epoch.learner.adapter.begin_step(epoch.learner.n_steps)
        losses = self.engine.forward(
            [Job(epoch.learner.adapter, rows, epoch.learner.is_dense) for epoch, rows in jobs]
        )
        counts = [epoch.n_targets(rows) for epoch, rows in jobs]
        weights = []
        for (epoch, rows), nll, correct in zip(
            jobs, losses.nll.split(counts), losses.correct.split(counts), strict=True
        ):
            epoch.learner.optimizer.zero_grad()
            weights.append(epoch.look(rows, nll, correct))
        if not any(w.any() for w in weights):
            return
        losses.backward(torch.cat(weights))
        for (epoch, _), weight in zip(jobs, weights, strict=True):
            if weight.any():
                epoch.step()


class _Epoch:
    """What one learner has seen of the current epoch."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.error: DivergedError | None = None
        self.nll_sum, self.n_tokens, self.n_under, self.n_over = 0.0, 0, 0, 0

    def n_targets(self, rows: Sequence[int]) -> int:
        return sum(len(self.learner.examples[row].target_ids) for row in rows)

    def look(self, rows: list[int], nll: Tensor, correct: Tensor) -> Tensor:
        """Count what is known, and weigh [N] what the step is to be spent on."""
        try:
            weights = self.learner.weigh(rows, nll, correct)
        except DivergedError as error:
            self.error = error
            return torch.zeros_like(nll)
        under = torch.exp(-nll) < self.learner.line_p  # [N]
        lengths = [len(self.learner.examples[row].target_ids) for row in rows]
        self.learner.see(rows, nll)
        self.nll_sum += float(nll.sum())
        self.n_tokens += len(nll)
        self.n_under += int(under.sum())
        self.n_over += sum(not bool(part.any()) for part in under.split(lengths))
        return weights

    def step(self) -> None:
        try:
            self.learner.step()
        except DivergedError as error:
            self.error = error

    def end(self, n_tokens_run: int, flop: float, wall_s: float) -> EpochStats | DivergedError:
        if self.error:
            return self.error
        nll_nats = self.nll_sum / self.n_tokens
        self.learner.end_epoch(nll_nats)
        return EpochStats(
            epoch=self.learner.epoch,
            nll_nats=nll_nats,
            n_under=self.n_under,
            n_records_over=self.n_over,
            n_steps=self.learner.n_steps,
            rank=self.learner.adapter.rank,
            retention=self.learner.retention,
            n_tokens_run=n_tokens_run,
            flop=flop,
            wall_s=wall_s,
        )
