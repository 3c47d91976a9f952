"""When an update is over: what is new is learnt, and nothing that was there has slipped."""

from __future__ import annotations

import torch

from memlaw.core.observer import EpochStats
from memlaw.measure.examine import Audit
from memlaw.train.engine import Job
from memlaw.writer.goals import Goals

LOOK_EPOCHS = 5
_AT_ONCE = 64  # records


class UpdateGoals(Goals):
    """Looks at the records that aren't trained, and lets those that slip be trained again."""

    def after(self, stats: EpochStats) -> str:
        """Why training is over after this epoch, if it is."""
        if stats.n_under and stats.epoch % LOOK_EPOCHS:
            self.forget()
            return ""
        if self.run_joined(self._slipped()) and not stats.n_under:
            self.forget()
            return ""
        return super().after(stats)

    def run_joined(self, rows: list[int]) -> bool:
        """Let records be trained from now on; returns whether any of them wasn't."""
        learner = self.run.learner
        now = learner.rows.tolist()
        new = sorted(set(rows) - set(now))
        if new:
            learner.train_on([*now, *new])
        return bool(new)

    @torch.no_grad()
    def _slipped(self) -> list[int]:
        """The records, among those that aren't trained, with a token under the line."""
        run, learner = self.run, self.run.learner
        trained = set(learner.rows.tolist())
        kept = [row for row in range(len(run.examples)) if row not in trained]
        for start in range(0, len(kept), _AT_ONCE):
            rows = kept[start : start + _AT_ONCE]
            losses = run.trainer.engine.forward([Job(learner.adapter, rows, False)])
            learner.seen.note(rows, losses.nll)
        return [row for row in kept if learner.seen.n_under([row])]

    def _audit(self) -> Audit:
        """The audit of all; what fails in it is trained from then on."""
        audit = super()._audit()
        self.run_joined([row for row, r in enumerate(audit.records) if not r.certified])
        return audit
