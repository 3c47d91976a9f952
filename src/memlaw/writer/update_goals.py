"""When an update is over: the new is learnt, the old has not slipped, the rest is forgotten."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from memlaw.core.observer import EpochStats
from memlaw.measure.examine import Audit
from memlaw.train.engine import Job
from memlaw.writer.goals import Goals
from memlaw.writer.state import Run

_AT_ONCE = 64  # records
_HARDER = 2.0
_PATIENCE = 5  # epochs without progress, until old records are held less tightly
_FALLING = 0.8  # of those that had slipped at the last look: fewer are coming back by themselves


class UpdateGoals(Goals):
    """Looks at the records that aren't trained, and lets those that slip be trained again.

    When what is trained is learnt, many of the others have slipped. Most come back by themselves,
    drawn by the hold on them; those that don't are trained, too.

    Args:
        run: what is trained, started from an earlier generation.
    """

    n_slipped: float = math.inf  # at the last look
    least_under: float = math.inf  # tokens under the line, of what is trained
    progress_at = 0  # the epoch in which there were so few first, or the hold was loosened last

    def after(self, stats: EpochStats) -> str:
        """Why training is over after this epoch, if it is."""
        self.forget()
        if stats.n_under:
            self._give_way(stats)
            return super().after(stats)
        slipped = self._slipped()
        if len(slipped) > _FALLING * self.n_slipped or not self.run.learner.keeping:
            join(self.run, slipped)
        self.n_slipped = len(slipped)
        return super().after(stats) if not slipped and self._is_forgotten() else ""

    def _give_way(self, stats: EpochStats) -> None:
        """Hold old records less tightly where what is new isn't learnt for them."""
        if stats.n_under < self.least_under:
            self.least_under, self.progress_at = stats.n_under, stats.epoch
        elif (keeping := self.run.learner.keeping) and stats.epoch - self.progress_at >= _PATIENCE:
            keeping.weight /= 2
            self.progress_at = stats.epoch

    def _look(self) -> str:
        if not (ended := super()._look()) or self.run.lost is None:
            return ended
        if all(one.holds for one in self.what_is_left()):
            return ended
        self.run.observer.notice("Certified, but not all is forgotten: that weighs more now.")
        assert self.run.learner.forgetting is not None
        self.run.learner.forgetting.harder *= _HARDER
        return ""

    def _is_forgotten(self) -> bool:
        """Whether every token that tells what is to be forgotten is within its bound."""
        forgetting = self.run.learner.forgetting
        if forgetting is None:
            return True
        rows = list(forgetting.bounds)
        return all(forgetting.kept(part, nll) for part, nll in losses(self.run, rows))

    def _slipped(self) -> list[int]:
        """The records, among those that aren't trained, with a token under the line."""
        run, seen = self.run, self.run.learner.seen
        trained = set(run.learner.rows.tolist())
        kept = [row for row in range(len(run.examples)) if row not in trained]
        for part, nll in losses(run, kept):
            seen.note(part, nll)
        return [row for row in kept if seen.n_under([row])]

    def _audit(self) -> Audit:
        """The audit of all; what fails in it is trained from then on."""
        audit = super()._audit()
        join(self.run, [row for row, r in enumerate(audit.records) if not r.certified])
        return audit


def join(run: Run, rows: Sequence[int]) -> bool:
    """Let records be trained from now on; returns whether any of them wasn't."""
    now = run.learner.rows.tolist()
    new = sorted(set(rows) - set(now))
    if new:
        run.learner.train_on([*now, *new])
    return bool(new)


@torch.no_grad()
def losses(run: Run, rows: Sequence[int]) -> list[tuple[list[int], Tensor]]:
    """The NLL of target tokens of the engine's examples, in parts: rows, and their tokens' [N]."""
    found = []
    for start in range(0, len(rows), _AT_ONCE):
        part = list(rows[start : start + _AT_ONCE])
        job = Job(run.learner.adapter, part, False)
        found.append((part, run.trainer.engine.forward([job]).nll))
    return found
