"""When an update is over: the new is learnt, the old has not slipped, the rest is forgotten."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from memlaw.core.observer import EpochStats
from memlaw.measure.examine import Audit
from memlaw.train.learner import beyond
from memlaw.writer.goals import ASKED, NEAR, SAFE, TINY, WAIT_EPOCHS, Goals, losses
from memlaw.writer.mean_goals import MeanGoals

_HARDER = 2.0
_PATIENCE = 5  # epochs without progress, until old records are held less tightly


class Watching(Goals):
    """What updates look at besides: records that aren't trained, and what is to be forgotten.

    When what is trained is learnt, some of the others have slipped; they are trained, too.

    Args:
        run: what is trained, started from an earlier generation.
    """

    near = NEAR

    def _old_ones_hold(self) -> bool:
        """Look at the records that aren't trained; if any have slipped, they are then.

        And those near them, which would slip next.
        """
        seen, trained = self.run.learner.seen, set(self.run.learner.rows.tolist())
        kept = [row for row in range(len(self.run.examples)) if row not in trained]
        self._look_at(kept)
        if not seen.n_under(kept, self._p(self.safe)):
            return True
        near = self._p(max(self.near, self.safe))
        self._join([row for row in kept if seen.n_under([row], near)])
        return False

    def _all_hold(self) -> bool:
        """Whether an audit is worth its time: the last step may have taken what it was to give."""
        learner = self.run.learner
        if not learner.keeping:
            return True
        trained = learner.rows.tolist()
        self._look_at(trained)
        return not learner.seen.n_under(trained) and self._old_ones_hold()

    def _look_at(self, rows: Sequence[int]) -> None:
        for part, nll in losses(self.run, rows):
            self.run.learner.seen.note(part, nll)

    def _join(self, rows: Sequence[int]) -> None:
        """Train these records, too, from now on."""
        learner = self.run.learner
        now = learner.rows.tolist()
        if new := sorted(set(rows) - set(now)):
            learner.train_on([*now, *new])
            if keeping := learner.keeping:
                keeping.least_under, keeping.progress_at = math.inf, learner.epoch

    def _give_way(self, n_under: int, epoch: int) -> None:
        """Hold old records less tightly where what is trained isn't learnt for them."""
        keeping = self.run.learner.keeping
        if keeping and n_under < keeping.least_under:
            keeping.least_under, keeping.progress_at = n_under, epoch
        else:
            self._loosen(epoch)

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

    def _audit(self) -> Audit:
        """The audit of all; what fails in it is trained from then on."""
        audit = super()._audit()
        failed = {row for row, r in enumerate(audit.records) if not r.certified}
        self._join(sorted(failed.union(audit.unsure)))
        return audit


class UpdateGoals(Watching):
    """When an update of a folder without specificity is over; see `Watching`."""

    failed_at = 0  # the epoch of the last audit that failed

    def after(self, stats: EpochStats) -> str:
        """Why training is over after this epoch, if it is."""
        self.forget()
        learner = self.run.learner
        if stats.n_under:
            self._give_way(stats.n_under, stats.epoch)
            return super().after(stats)
        if learner.keeping and not self._are_safe():
            return ""
        # Before that, at a high rate, no look is worth its time.
        hold, is_forgotten = self._all_hold(), self._is_forgotten()
        if hold and is_forgotten:
            return super().after(stats)
        if not is_forgotten:  # the hold stands in the way of that, too
            self._loosen(stats.epoch)
        return ""

    def _has_waited(self) -> bool:
        return super()._has_waited() and self.run.learner.epoch - self.failed_at >= WAIT_EPOCHS

    def _look(self) -> str:
        ended = super()._look()
        return ended if ended and self._nothing_is_left() else ""

    def _has_asked(self, rows: Sequence[int]) -> bool:
        learner, config = self.run.learner, self.run.config
        if not learner.keeping:
            return super()._has_asked(rows)
        goal_p = beyond(config.threshold + config.margin)
        for _ in range(ASKED):
            goal_p = beyond(goal_p)
        return learner.goal_p >= goal_p - TINY

    def _aim_higher(self) -> None:
        learner = self.run.learner
        if learner.keeping:
            # What failed is trained from now on. A higher line for all would let others slip.
            self._join([*self._failed_rows(), *self._unsure_rows()])
            self.safe += (1 - self.safe) / 4
            self.failed_at = learner.epoch
            learner.goal_p = beyond(learner.goal_p)
        else:
            super()._aim_higher()


class UpdateMeanGoals(Watching, MeanGoals):
    """When an update of a folder with specificity is over: the mean of the weights counts."""

    safe = near = 0.0  # a share of 0 is the line: the mean is asked for more where it is looked at
    looked_at = 0  # the epoch in which records that aren't trained were looked at last

    def after(self, stats: EpochStats) -> str:
        """Why training is over after this epoch, if it is."""
        self.forget()
        recipe = self.holding.recipe
        if stats.n_under and not self.holding.first_over:
            self._give_way(stats.n_under, stats.epoch)
        waited = stats.epoch - self.looked_at >= recipe.look_epochs
        if waited and self.run.learner.seen.share_under() < recipe.look_share:
            self.looked_at = stats.epoch
            self._old_ones_hold()
        return super().after(stats)

    def _look_at_mean(self) -> Tensor:
        lowest = super()._look_at_mean()
        self._join((lowest < self._p(SAFE)).nonzero()[:, 0].tolist())
        return lowest

    def _ask_for_more(self) -> None:
        self._join(self._failed_rows())
        super()._ask_for_more()

    def _finish(self) -> str:
        ended = super()._finish()
        if not ended or self._nothing_is_left():
            return ended
        self._loosen(self.run.learner.epoch)  # the hold stands in the way of that, too
        self._hide()
        self.holding.forget_kept()
        return ""
