"""When a training that holds the model to its base is over: the mean of the weights counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from memlaw.core.observer import EpochStats
from memlaw.train.gate import add_gate, can_gate, solve_gate
from memlaw.train.holding import Weights
from memlaw.train.learner import RAISE, DivergedError
from memlaw.writer.goals import ASKED, SAFE, TINY, UNSURE, Goals, losses
from memlaw.writer.state import Run

_OVER = 1 / 36  # of the way from the line to certainty: p .5625 for .55


class MeanGoals(Goals):
    """Looks at the running mean now and then, and keeps it when all records are well over the line.

    From the first mean on with which all are over the line at all, training goes on for a while in
    smaller steps, with what holds the model growing stronger. If none was kept by then, over the
    line is enough. With bounds on harm it goes on until they are kept.

    Args:
        run: what is trained; its learner has a `holding`.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        assert run.learner.holding is not None
        self.holding = run.learner.holding
        self.measured_at = 0  # the epoch whose kept mean was measured last
        self._odds = torch.zeros(0)  # of each target token over the line's, when last looked at

    def at_start(self) -> str:
        """Why no training is needed, if a resumed run had come to its end."""
        return self._finish() if self._is_over() else ""

    def after(self, stats: EpochStats) -> str:
        """Why training is over after this epoch, if it is."""
        run, holding = self.run, self.holding
        self.forget()
        if holding.is_due(run.learner.epoch, run.learner.seen.share_under()):
            lowest = self._look_at_mean()
            holding.focus_on(self._odds)
            holding.after_look(
                run.learner.epoch, self._share(lowest, self._enough()), self._share(lowest, _OVER)
            )
        if self._is_over() and (ended := self._finish()):
            return ended
        if ended := self._gives_up():
            return ended
        is_good = self.best is not None and self.best.excess <= 1
        if holding.kept is None and not is_good and self._is_stuck():
            self._give_room()
        return ""

    def at_end(self) -> str:
        """Why training is over when all epochs are done.

        Raises:
            DivergedError: the last step left weights that compute no numbers.
        """
        learner, holding = self.run.learner, self.holding
        before = learner.state()
        if holding.kept is None and self.measured_at < learner.epoch and self._mean_is_over():
            holding.keep(learner.epoch)
        if holding.kept is not None and (ended := self._finish()):
            return ended
        if holding.kept is None:  # a resumed run goes on as a longer one would have
            learner.restore(*before)
            self.forget()
        why = self.settle(f"max_epochs ({self.run.config.max_epochs}) reached")
        if not math.isfinite(self.found().audit.nll_nats):
            self._hide()
            raise DivergedError(f"the loss is not finite after step {self.run.learner.n_steps}.")
        return why

    def settle(self, why: str) -> str:
        """Training is over: show the best weights there are."""
        learner = self.run.learner
        if self.best:
            learner.restore(*self.best.state)
            self.run.curve = self.best.curve
        if (weights := self.holding.kept or self.holding.mean) is not None:
            self._show(weights)
        if best := self.best:
            self.audit, self.harms, self.forms = best.audit, best.harms, best.forms
            return UNSURE if best.excess <= 1 else why
        return why

    # ------------------------------------------------------------ looking

    def _look_at_mean(self) -> Tensor:
        """The lowest p of each record's tokens [R] with the mean."""
        assert self.holding.mean is not None
        return self._lowest_p(self.holding.mean)

    def _mean_is_over(self) -> bool:
        """Whether there is a mean with which all records are a little over the line."""
        if self.holding.mean is None or not self.holding.first_over:
            return False
        return self._share(self._lowest_p(self.holding.mean), _OVER) == 1

    def _enough(self) -> float:
        """How far beyond the line all tokens of a mean must be for it to be kept.

        Less, once it is time to end and none was so far; but not behind an audit that failed.
        """
        run, holding = self.run, self.holding
        is_late = 0 < holding.late_epoch <= run.learner.epoch
        raised = run.learner.seen.line_p > run.config.threshold + run.config.margin + TINY
        failed = raised or bool(holding.failed.any())
        return _OVER if is_late and holding.kept is None and not failed else SAFE

    def _is_over(self) -> bool:
        """Something was kept and not measured yet, and training went on for long enough."""
        holding, epoch = self.holding, self.run.learner.epoch
        return (
            holding.kept is not None
            and holding.last_kept > self.measured_at
            and epoch >= holding.last_epoch
        )

    def _solve_gate(self) -> None:
        """Part near misses from records in what was kept; keep that, if all records pass still."""
        run, holding = self.run, self.holding
        assert holding.kept is not None
        if not holding.n_near or not can_gate(run.learner.adapter):
            return
        is_first = holding.gate is None
        if is_first:
            holding.start_from(run.learner.adapter, holding.kept)
            add_gate(run.learner)
            holding.kept = self._shown()
        self._show(holding.kept)
        solve_gate(run.trainer.engine, run.learner)
        gated = self._shown()
        if is_first:  # training, if it has to go on, does so with the gate
            holding.start_from(run.learner.adapter, gated)
            holding.begin_mean(run.learner.adapter)
        # It takes some of what records have beyond the line; what that does to those that failed
        # before, the audit will tell.
        line_p = run.learner.seen.line_p
        if bool((self._lowest_p(gated) >= line_p + _OVER * (1 - line_p)).all()):
            holding.kept = gated
        else:
            run.observer.notice(
                "Records fail with what parts near misses from them: it isn't taken this time."
            )

    def _shown(self) -> Weights:
        """A copy of the weights that the adapter has now."""
        return [weights.detach().clone() for weights in self.run.learner.adapter.parameters()]

    def _share(self, lowest_p: Tensor, beyond: float) -> float:
        """The share of the records whose tokens are all over their line, and so far beyond it."""
        lines = self._lines()
        least = lines + max(self._beyond(beyond), _OVER) * (1 - lines)
        return float((lowest_p >= least).float().mean())

    def _lines(self) -> Tensor:
        """The line [R] of each record: higher where it failed audits that nearly all passed."""
        return 1 - (1 - self.run.learner.seen.line_p) * (1 - RAISE) ** self.holding.failed

    def _lowest_p(self, weights: Weights) -> Tensor:
        """The lowest p of each record's tokens [R] with other weights, as training sees it."""
        run = self.run
        self._show(weights)
        nll = torch.cat([nll for _, nll in losses(run, range(len(run.examples)))]).float()
        self._hide()
        p = (-nll).exp().cpu()
        lengths = [len(example.target_ids) for example in run.examples]
        self._odds = p.logit(TINY) - self._lines().logit().repeat_interleave(torch.tensor(lengths))
        parts = p.split(lengths)
        return torch.stack([part.min() for part in parts])

    def _finish(self) -> str:
        """Look at what was kept as a user will; returns why training is over, if it is."""
        run, holding = self.run, self.holding
        self.measured_at = run.learner.epoch
        # A gate that was there is solved anew only for what passes with it as it is.
        if holding.gate is not None and not self._passes():
            return ""
        before, audit, forms = holding.kept, self.audit, self.forms
        self._solve_gate()
        if before is not None and holding.kept is before and audit is not None:  # passed already
            self._show(before)
            self.audit, self.forms = audit, forms
        elif not self._passes():
            return ""
        if not self.bounds:
            return "certified"
        assert self.audit is not None
        if self._weigh_harms(self.audit) <= 1:
            return self._met()
        self._hide()
        holding.most_push *= holding.recipe.tighter
        return ""

    def _passes(self) -> bool:
        """Look at what was kept as a user will; where that fails, more is asked for."""
        assert self.holding.kept is not None
        self._show(self.holding.kept)
        if self._holds_everywhere():
            return True
        self._ask_for_more()
        self._hide()
        return False

    def _ask_for_more(self) -> None:
        """The audit failed: where a few records did, in whatever form, of these; else of all.

        Where all passed it, but some not surely, of these, however many they are.
        """
        failed = self._failed_rows()
        unsure = [row for row in self._unsure_rows() if self.holding.failed[row] < ASKED]
        if unsure and not failed:
            self.holding.mend(unsure, of_any_number=True)
        elif self.holding.mend(failed):
            self.holding.failed[[row for row in unsure if row not in failed]] += 1
        else:
            self.holding.forget_kept()
            self.run.learner.raise_goal()

    def _has_asked(self, rows: Sequence[int]) -> bool:
        return bool((self._lines()[list(rows)] >= self._raised_line()).all())

    def _hold_looser(self) -> None:
        self.holding.hold_looser()
        self.run.observer.notice(
            "No progress: what holds other answers is lowered, to "
            f"{self.holding.push:g} times what it is without more."
        )

    def _show(self, weights: Weights) -> None:
        self.holding.show(self.run.learner.adapter, weights)
        self.forget()

    def _hide(self) -> None:
        self.holding.hide(self.run.learner.adapter)
        self.forget()
