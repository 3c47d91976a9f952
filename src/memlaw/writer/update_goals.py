"""When an update is over: the new is learnt, the old has not slipped, the rest is forgotten."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from memlaw.core.observer import EpochStats
from memlaw.measure.examine import Audit
from memlaw.train.holding import Weights
from memlaw.train.keeping import SLACK
from memlaw.writer.goals import Goals, losses
from memlaw.writer.mean_goals import MeanGoals

_HARDER = 2.0
_PATIENCE = 5  # epochs without progress, until old records are held less tightly
_FALLING = 0.8  # of those that had slipped at the last look: fewer are coming back by themselves


class Watching(Goals):
    """What updates look at besides: records that aren't trained, and what is to be forgotten.

    When what is trained is learnt, many of the others have slipped. Most come back by themselves,
    drawn by the hold on them; those that don't are trained, too.

    Args:
        run: what is trained, started from an earlier generation.
    """

    def _old_ones_hold(self) -> bool:
        """Look at the records that aren't trained; those that have slipped for good are then."""
        slipped, keeping = self._slipped(), self.run.learner.keeping
        if not keeping or len(slipped) > _FALLING * keeping.n_slipped:
            self._join(slipped)
        if keeping:
            keeping.n_slipped = len(slipped)
        return not slipped

    def _all_hold(self) -> bool:
        """Whether an audit is worth its time: the last step may have taken what it was to give."""
        run, line = self.run, self._line()
        if run.learner.keeping:
            rows = run.learner.rows.tolist()
            if any(bool((torch.exp(-nll) < line).any()) for _, nll in losses(run, rows)):
                return False
        return self._old_ones_hold()

    def _line(self) -> float:
        """The p that a look asks for: in the audit's batches tokens round otherwise."""
        learner = self.run.learner
        return learner.seen.line_p + (learner.keeping.slack if learner.keeping else 0.0)

    def _join(self, rows: Sequence[int]) -> None:
        """Train these records, too, from now on."""
        learner = self.run.learner
        now = learner.rows.tolist()
        if new := sorted(set(rows) - set(now)):
            learner.train_on([*now, *new])
            if keeping := learner.keeping:
                if len(new) > len(now):  # fewer are left to hold, and more have to move
                    keeping.weight /= 4
                keeping.least_under, keeping.progress_at = math.inf, learner.epoch

    def _give_way(self, stats: EpochStats) -> None:
        """Hold old records less tightly where what is new isn't learnt for them."""
        keeping = self.run.learner.keeping
        if keeping and stats.n_under < keeping.least_under:
            keeping.least_under, keeping.progress_at = stats.n_under, stats.epoch
        else:
            self._loosen(stats.epoch)

    def _loosen(self, epoch: int) -> None:
        """Loosen the hold on old records, where for some epochs nothing has got better."""
        keeping = self.run.learner.keeping
        if keeping and epoch - keeping.progress_at >= _PATIENCE:
            keeping.give_way()
            keeping.progress_at = epoch

    def _nothing_is_left(self) -> bool:
        """Whether what was removed is gone by all measures; if not, that weighs more from now."""
        if all(one.holds for one in self.what_is_left()):
            return True
        self.run.observer.notice("Certified, but not all is forgotten: that weighs more now.")
        assert self.run.learner.forgetting is not None
        self.run.learner.forgetting.harder *= _HARDER
        return False

    def _is_forgotten(self) -> bool:
        """Whether every token that tells what is to be forgotten is within its bound."""
        forgetting = self.run.learner.forgetting
        if forgetting is None:
            return True
        rows = list(forgetting.bounds)
        return all(forgetting.kept(part, nll) for part, nll in losses(self.run, rows))

    def _slipped(self) -> list[int]:
        """The records, among those that aren't trained, with a token under the line or near it."""
        run, seen, line = self.run, self.run.learner.seen, self._line()
        trained = set(run.learner.rows.tolist())
        kept = [row for row in range(len(run.examples)) if row not in trained]
        for part, nll in losses(run, kept):
            seen.note(part, nll)
        return [row for row in kept if seen.n_under([row], line)]

    def _audit(self) -> Audit:
        """The audit of all; what fails in it is trained from then on."""
        audit = super()._audit()
        self._join([row for row, r in enumerate(audit.records) if not r.certified])
        return audit


class UpdateGoals(Watching):
    """When an update of a folder without specificity is over; see `Watching`."""

    def after(self, stats: EpochStats) -> str:
        """Why training is over after this epoch, if it is."""
        self.forget()
        if stats.n_under:
            self._give_way(stats)
            return super().after(stats)
        # Before that, at a high rate, no look is worth its time.
        hold, is_forgotten = self._all_hold(), self._is_forgotten()
        if hold and is_forgotten:
            return super().after(stats)
        if not is_forgotten:  # the hold stands in the way of that, too
            self._loosen(stats.epoch)
        return ""

    def _look(self) -> str:
        ended = super()._look()
        return ended if ended and self._nothing_is_left() else ""

    def _aim_higher(self) -> None:
        learner = self.run.learner
        if keeping := learner.keeping:
            # What failed is trained now. A higher line for all would let others slip: a look asks
            # for more room above it, and training aims beyond that.
            line = learner.seen.line_p
            keeping.slack = min(keeping.slack + SLACK, (1 - line) / 4)
            learner.goal_p = max(learner.goal_p, line + 2 * keeping.slack)
        else:
            super()._aim_higher()


class UpdateMeanGoals(Watching, MeanGoals):
    """When an update of a folder with specificity is over: the mean of the weights counts."""

    looked_at = 0  # the epoch in which records that aren't trained were looked at last

    def after(self, stats: EpochStats) -> str:
        """Why training is over after this epoch, if it is."""
        self.forget()
        learner, recipe = self.run.learner, self.holding.recipe
        rows = learner.rows.tolist()
        share = sum(learner.seen.n_under([row]) > 0 for row in rows) / len(rows)
        if share >= recipe.look_share:
            self._give_way(stats)
        elif stats.epoch - self.looked_at >= recipe.look_epochs:
            self.looked_at = stats.epoch
            self._old_ones_hold()
        return super().after(stats)

    def _passed(self, weights: Weights) -> list[bool]:
        passed = super()._passed(weights)
        self._join([row for row, good in enumerate(passed) if not good])
        return passed

    def _finish(self) -> str:
        ended = super()._finish()
        if not ended or self._nothing_is_left():
            return ended
        self._hide()
        self.holding.forget_kept()
        return ""
