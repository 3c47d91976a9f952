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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from memlaw.core.observer import EpochStats
from memlaw.train.engine import Engine, Job
from memlaw.train.learner import DivergedError, Learner

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
        # Floating-point operations a token in the layers that are run, forwards and backwards;
        # counted in the first step of each.
        self.flop_there: float | None = None
        self.flop_back: float | None = None

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
            self._step(jobs)
        n_tokens = self.engine.n_tokens - tokens_before
        wall_s = time.perf_counter() - started
        return [epoch.end(n_tokens, wall_s) for epoch in epochs]

    def _step(self, jobs: Sequence[tuple[_Epoch, list[int]]]) -> None:
        if not jobs:
            return
        for epoch, _ in jobs:
            epoch.learner.adapter.begin_step(epoch.learner.n_steps)
        hints = [epoch.learner.is_dense for epoch, _ in jobs]
        held = [epoch.learner.draw_held() for epoch, _ in jobs]
        pushed = [epoch.learner.pushed(drawn) for (epoch, _), drawn in zip(jobs, held, strict=True)]
        tokens_before, device = self.engine.n_tokens, jobs[0][0].learner.device
        with _counter(self.flop_there is None, device) as forward:
            losses = self.engine.forward(
                [
                    Job(epoch.learner.adapter, [*rows, *more], hint, drawn)
                    for (epoch, rows), more, hint, drawn in zip(
                        jobs, pushed, hints, held, strict=True
                    )
                ]
            )
        counts = [epoch.n_targets(rows) for epoch, rows in jobs]
        n_held, n_pushed = ([self._n_targets(rows) for rows in each] for each in (held, pushed))
        totals = [n + more for n, more in zip(counts, n_pushed, strict=True)]
        weights, kl_weights = [], []
        for (epoch, rows), n, more, nll, correct, drawn, kl in zip(
            jobs,
            counts,
            pushed,
            losses.nll.split(totals),
            losses.correct.split(totals),
            held,
            losses.kl.split(n_held),
            strict=True,
        ):
            epoch.learner.solver.zero_grad()
            learnt = epoch.look(rows, nll[:n], correct[:n])
            weights.append(torch.cat([learnt, epoch.learner.weigh_pushed(more, nll[n:])]))
            kl_weights.append(epoch.learner.weigh_held(drawn, kl))
        is_stepping = any(bool(w.any()) for w in weights)
        with _counter(is_stepping and self.flop_back is None, device) as backward:
            if is_stepping:
                losses.backward(torch.cat(weights), torch.cat(kl_weights))
        spent = self.engine.n_tokens - tokens_before
        self._account(jobs, hints, weights, n_held, spent, forward, backward)
        for (epoch, _), weight in zip(jobs, weights, strict=True):
            if weight.any():
                epoch.step()

    def _n_targets(self, rows: Sequence[int]) -> int:
        return sum(len(self.engine.examples[row].target_ids) for row in rows)

    def _account(
        self,
        jobs: Sequence[tuple[_Epoch, list[int]]],
        hints: Sequence[bool],
        weights: Sequence[Tensor],
        n_held: Sequence[int],
        n_tokens: int,
        forward: FlopCounterMode | None,
        backward: FlopCounterMode | None,
    ) -> None:
        """Add to each learner's account what a step cost it."""
        head = self.engine.model.get_output_embeddings().weight
        rows = []
        for w, hint, n in zip(weights, hints, n_held, strict=True):
            there, back = self.engine.head_rows(len(w), int((w != 0).sum()), dense=hint)
            rows.append((there + 3 * n, back))  # held: the bare model's, and the adapted one's
        if forward is not None:
            in_head = 2 * head.numel() * sum(there for there, _ in rows)
            self.flop_there = (forward.get_total_flops() - in_head) / n_tokens
        if backward is not None:
            in_head = 2 * head.numel() * sum(back for _, back in rows)
            self.flop_back = (backward.get_total_flops() - in_head) / n_tokens
        lengths = [epoch.n_tokens(rows) for epoch, rows in jobs]
        for (epoch, _), weight, (there, back), length in zip(
            jobs, weights, rows, lengths, strict=True
        ):
            in_layers = (self.flop_there or 0.0) + bool(weight.any()) * (self.flop_back or 0.0)
            epoch.flop += n_tokens * length / sum(lengths) * in_layers
            epoch.flop += 2 * head.numel() * (there + back)


@contextmanager
def _counter(wanted: bool, device: torch.device) -> Iterator[FlopCounterMode | None]:
    """Counts operations within the block, if that is wanted.

    On a GPU attention is taken apart into matrix products meanwhile: PyTorch's formulas for its
    fused kernels there refuse, in some releases, keys with fewer heads than queries.
    """
    with ExitStack() as stack:
        if wanted and device.type != "cpu":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield stack.enter_context(FlopCounterMode(display=False)) if wanted else None


class _Epoch:
    """What one learner has seen of the current epoch."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.error: DivergedError | None = None
        self.nll_sum, self.n_seen, self.n_under, self.n_over = 0.0, 0, 0, 0
        self.flop = 0.0
        self.n_relapses = 0
        self.rows: list[int] = []

    def n_targets(self, rows: Sequence[int]) -> int:
        return sum(len(self.learner.examples[row].target_ids) for row in rows)

    def n_tokens(self, rows: Sequence[int]) -> int:
        return self.n_targets(rows) + sum(len(self.learner.examples[r].prompt_ids) for r in rows)

    def look(self, rows: list[int], nll: Tensor, correct: Tensor) -> Tensor:
        """Count what is known, and weigh [N] what the step is to be spent on."""
        try:
            weights = self.learner.weigh(rows, nll, correct)
        except DivergedError as error:
            self.error = error
            return torch.zeros_like(nll)
        under = (torch.exp(-nll) < self.learner.seen.line_p).cpu()  # [N]
        lengths = [len(self.learner.examples[row].target_ids) for row in rows]
        self.n_relapses += self.learner.seen.note(rows, nll)
        self.rows += rows
        self.nll_sum += float(nll.sum())
        self.n_seen += len(nll)
        self.n_under += int(under.sum())
        self.n_over += sum(not bool(part.any()) for part in under.split(lengths))
        return weights

    def step(self) -> None:
        try:
            self.learner.step()
        except DivergedError as error:
            self.error = error

    def end(self, n_tokens_run: int, wall_s: float) -> EpochStats | DivergedError:
        if self.error:
            return self.error
        nll_nats = self.nll_sum / self.n_seen
        left_out = set(self.learner.rows.tolist()) - set(self.rows)
        self.n_under += self.learner.seen.n_under(sorted(left_out))
        self.learner.end_epoch(nll_nats)
        return EpochStats(
            epoch=self.learner.epoch,
            nll_nats=nll_nats,
            n_under=self.n_under,
            n_records_over=self.n_over,
            n_relapses=self.n_relapses,
            n_left_out=len(left_out),
            n_steps=self.learner.n_steps,
            rank=self.learner.adapter.rank,
            retention=self.learner.retention_weight,
            n_tokens_run=n_tokens_run,
            flop=self.flop,
            wall_s=wall_s,
        )
