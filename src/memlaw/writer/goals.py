"""When training is over: certified, within the bounds on harm, or out of ways to get there."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from memlaw.certify.audit_saved import audit_as_saved
from memlaw.core.criterion import of_thousand
from memlaw.core.observer import EpochStats
from memlaw.measure.examine import Audit
from memlaw.measure.forgotten import Forgotten, measure_forgotten
from memlaw.measure.harm import Harm
from memlaw.train.engine import target_losses
from memlaw.train.learner import RAISE, DivergedError
from memlaw.writer.robust import Robust
from memlaw.writer.state import Run, State

REACHED = "certified"  # begins why training is over, where all is met that was asked for
UNSURE = f"{REACHED}, but not as surely as was asked for"
DEAR = "it had cost more than it may"  # likewise, where training is given up for that
PATIENCE_EPOCHS = 40
# Shares of the way from the line to certainty, p .7 and .8 for .55. Two ways through an adapted
# model in bfloat16 differ by about half a unit of a token's log-odds; .7 is .65 above the line.
SAFE, NEAR = 0.33, 0.55
WAIT_EPOCHS = 10  # for the last tokens to be safe, once none is under the line
ASKED = 2  # times that more is asked of records that pass, but not surely
TINY = 1e-6  # of a probability
_TIGHTER = 1.25  # retention's change, an epoch, once certified with more harm than allowed


class Found(NamedTuple):
    """What was measured of the weights as they are."""

    audit: Audit
    harms: dict[str, Harm]
    forms: dict[str, Audit]

    def meets(self, bounds: Mapping[str, float]) -> bool:
        """Certified, in every form that was asked for, and within the bounds on harm."""
        audits = (self.audit, *self.forms.values())
        within = (self.harms[name].high <= bound for name, bound in bounds.items())
        return all(audit.certified for audit in audits) and all(within)


@dataclass(frozen=True, kw_only=True)
class Certified:
    """A certified adapter on the way to less harm, or to a surer one.

    Attributes:
        epoch, state, curve: where it was.
        audit, harms, forms: what was measured of it; harms only where they are bounded.
        excess: how far it is above the bounds on harm; at most 1 is within.
    """

    epoch: int
    state: State
    curve: list[EpochStats]
    audit: Audit
    harms: dict[str, Harm] | None
    forms: dict[str, Audit] | None
    excess: float


class Goals:
    """Decides, epoch by epoch, whether a run of `write` is there, and what it needs to get there.

    Args:
        run: what is trained. Its retention, rank and aim are changed where that helps.

    Attributes:
        most_flop: what training may cost until it is given up.
    """

    safe = SAFE
    most_flop = math.inf

    def __init__(self, run: Run) -> None:
        self.run = run
        self.robust = Robust(run)
        self.bounds = run.bounds()
        self.forget()
        self.best: Certified | None = None
        self.look_at_penalty = math.inf

    def forget(self) -> None:
        """The weights have changed: what was measured isn't theirs any more."""
        self.audit: Audit | None = None  # of the weights as they are now
        self.harms: dict[str, Harm] | None = None  # likewise
        self.forms: dict[str, Audit] | None = None  # likewise, in the forms that were asked for
        self.left: list[Forgotten] | None = None  # of what is to be forgotten, likewise

    def at_start(self) -> str:
        """Why no training is needed, if a resumed run was certified before; else nothing."""
        curve = self.run.curve
        if self.bounds and curve and curve[-1].n_under == 0 and self._are_safe():
            return self._look()
        return ""

    def after(self, stats: EpochStats) -> str:
        """Why training is over after this epoch, if it is."""
        learner = self.run.learner
        self.forget()
        if stats.n_under == 0 and self._are_safe() and self._penalty() <= self.look_at_penalty:
            return self._look()
        if ended := self._gives_up():
            return ended
        if self.best is not None and self.best.excess > 1:
            learner.retention.weight *= _TIGHTER if stats.n_under == 0 else 1 / _TIGHTER
        elif self.best is None and self._is_stuck():
            self._give_room()
        return ""

    def _gives_up(self) -> str:
        """Why training is over where it has been certified, and nothing better was found since."""
        if self.best is None:
            return ""
        waited = self.run.learner.epoch - self.best.epoch
        if self.best.excess <= 1:  # what is to be forgotten, too, wasn't looked for in it
            is_whole = self.run.lost is None and waited > PATIENCE_EPOCHS
            return self.settle(UNSURE) if is_whole else ""
        if waited > 2 * PATIENCE_EPOCHS:
            return self.settle("no way found to certify with less damage")
        return ""

    def dear(self) -> str:
        """Why training is over, if it has cost more than it may: `DEAR`, unless it is certified."""
        if sum(stats.flop for stats in self.run.curve) <= self.most_flop:
            return ""
        is_good = self.best and self.best.excess <= 1 and self.run.lost is None
        return self.settle(UNSURE) if is_good else DEAR

    def at_end(self) -> str:
        """Why training is over when all epochs are done.

        Raises:
            DivergedError: the last step left weights that compute no numbers.
        """
        config, learner = self.run.config, self.run.learner
        self.audit = self.audit or self._audit()
        if self.audit.certified and self.bounds:
            self.harms = self.harms or self._harms()
        if not math.isfinite(self.audit.nll_nats):
            raise DivergedError(f"the loss is not finite after step {learner.n_steps}.")
        return self.settle(f"max_epochs ({config.max_epochs}) reached")

    def settle(self, why: str) -> str:
        """Training is over: go back to what was certified with less harm, if anything was."""
        here = None
        if self.audit and self.audit.certified and not (self.bounds and self.harms is None):
            here = self._excess(self.harms or {})
        if (best := self.best) and (here is None or best.excess < here):
            self.run.learner.restore(*best.state)
            self.run.curve = best.curve
            self.audit, self.harms, self.forms = best.audit, best.harms, best.forms
            return UNSURE if best.excess <= 1 else why
        if here is not None and self.bounds and here <= 1:
            return self._met()
        return why

    def found(self) -> Found:
        """What the weights are now, measured if it wasn't yet."""
        self.audit = self.audit or self._audit()
        self.harms = self.harms or self._harms()
        if self.forms is None:
            self.forms = self.robust.audits()
        return Found(self.audit, self.harms, self.forms)

    def what_is_left(self) -> list[Forgotten]:
        """What the weights as they are give of each removed record; measured if it wasn't yet."""
        run, started = self.run, time.perf_counter()
        if self.left is None and run.lost is not None:
            run.observer.notice("Looking for what was removed.")
            self.left = measure_forgotten(
                run.subject,
                lambda: run.learner.adapter.folded().attached(run.base.model),
                run.lost.records,
                avoid=[example.record.prompt for example in run.examples],
                anew=run.anew,
                progress=run.observer.progress,
            )
            run.forgetting_s += time.perf_counter() - started
        return self.left or []

    def _met(self) -> str:
        settings = dict.fromkeys(self.run.measurements[name].bound for name in self.bounds)
        said = [f"{'below' if s.startswith('max') else 'above'} {s}" for s in settings]
        return f"{REACHED}, and {' and '.join(said)}"

    def _excess(self, harms: dict[str, Harm]) -> float:
        """How many times its bound the worst of the bounded kinds may be; at most 1 is met."""
        return max((harms[name].high / bound for name, bound in self.bounds.items()), default=0.0)

    # ------------------------------------------------------------ looking

    def _audit(self) -> Audit:
        run, config, started = self.run, self.run.config, time.perf_counter()
        audit = audit_as_saved(
            run.learner.adapter,
            run.base,
            run.examples,
            threshold=config.threshold,
            margin=config.margin,
            batch_size=config.audit_batch_size,
            progress=run.observer.progress,
        )
        run.audit_s = time.perf_counter() - started
        return audit

    def _holds_everywhere(self) -> bool:
        """Look as a user will: all is certified, in the forms that were asked for, too.

        And surely: what is not so sure is asked for more, a few times.
        """
        self.audit = self._audit()
        self.forms = self.robust.audits() if self.audit.certified else None
        in_forms = {f" ({name})": audit for name, audit in (self.forms or {}).items()}
        missed = [
            f"{_failed(audit)} of {len(audit.records)} records{form}"
            for form, audit in {"": self.audit, **in_forms}.items()
            if not audit.certified
        ]
        if missed:
            self.run.observer.notice(f"Failed the audit: {', '.join(missed)}.")
            return False
        if not self.audit.unsure:
            return True
        if self._has_asked(self._unsure_rows()):
            return True
        self.run.observer.notice(
            f"Certified, but rounded otherwise, in other batches, {of_thousand(_flips(self.audit))}"
            f" of 1,000 answers would be others: {len(self.audit.unsure)} record(s) have to be "
            "surer."
        )
        self.harms = self._harms() if self.bounds else None
        excess = self._excess(self.harms or {})
        best = self.best
        here = (max(1.0, excess), _flips(self.audit))
        if best is None or here < (max(1.0, best.excess), _flips(best.audit)):
            self._keep_as_best(self.audit, excess)
        return False

    def _keep_as_best(self, audit: Audit, excess: float) -> None:
        """Remember the weights as they are: they are certified."""
        self.best = Certified(
            epoch=self.run.learner.epoch,
            state=self.run.learner.state(),
            curve=list(self.run.curve),
            audit=audit,
            harms=self.harms,
            forms=self.forms,
            excess=excess,
        )

    def _has_asked(self, rows: Sequence[int]) -> bool:
        """Whether so much more has been asked of these records that what they have is enough."""
        return self.run.learner.seen.line_p >= self._raised_line()

    def _raised_line(self) -> float:
        """The line, raised as often as it is for records that pass, but not surely."""
        line_p = self.run.config.threshold + self.run.config.margin
        return 1 - (1 - line_p) * (1 - RAISE) ** ASKED - TINY

    def _failed_rows(self) -> list[int]:
        """The records that failed the last audit, in whatever form that was asked for."""
        audits = [self.audit, *(self.forms or {}).values()]
        failed = {
            row
            for audit in audits
            if audit is not None
            for row, record in enumerate(audit.records)
            if not record.certified
        }
        return sorted(failed)

    def _unsure_rows(self) -> list[int]:
        """The records that the last audit found recited, but not surely enough."""
        return list(self.audit.unsure) if self.audit is not None else []

    def _p(self, share: float) -> float:
        """The p so far above the line; the line itself where rounding is too small to count."""
        line_p = self.run.learner.seen.line_p
        return line_p + self._beyond(share) * (1 - line_p)

    def _beyond(self, share: float) -> float:
        """The share itself; 0 where rounding is too small to count."""
        is_exact = torch.finfo(self.run.base.model.dtype).bits > 16
        return 0.0 if is_exact else share

    def _are_safe(self) -> bool:
        """Whether all that is trained stands other roundings, too, or has had time to get there."""
        learner = self.run.learner
        safe_p = max(learner.seen.line_p, min(self._p(self.safe), learner.goal_p))
        return self._has_waited() or not learner.seen.n_under(learner.rows.tolist(), safe_p)

    def _has_waited(self) -> bool:
        lately = self.run.curve[-WAIT_EPOCHS:]
        return len(lately) == WAIT_EPOCHS and not any(e.n_under for e in lately)

    def _penalty(self) -> float:
        learner = self.run.learner
        return learner.retention.penalty(learner.adapter).item()

    def _harms(self) -> dict[str, Harm]:
        base, adapter = self.run.base, self.run.learner.adapter
        if self.run.config.specificity:
            self.run.observer.notice("Measuring what else has changed.")
        return {
            name: measurement.measure(base.model, lambda: adapter.folded().attached(base.model))
            for name, measurement in self.run.measurements.items()
        }

    def _look(self) -> str:
        """Training sees success: look as a user will; returns why training is over, if it is."""
        learner = self.run.learner
        if not self._holds_everywhere():
            self._aim_higher()
            return ""
        if not self.bounds:
            return REACHED
        assert self.audit is not None
        excess = self._weigh_harms(self.audit)
        if excess <= 1:
            return self._met()
        # The penalty is about proportional to the harm: no look is worth its time until it has
        # come down as far as the harm has to. Till then retention rises with every epoch that
        # leaves no token under the line, and falls with every other.
        self.look_at_penalty = self._penalty() * max(0.5, 0.9 / excess)
        learner.retention.weight *= _TIGHTER
        return ""

    def _aim_higher(self) -> None:
        """The audit failed where training saw success."""
        self.run.learner.raise_goal()

    def _weigh_harms(self, audit: Audit) -> float:
        """How far certified weights are above the bounds; above 1, the best so far are kept."""
        self.harms = harms = self._harms()
        excess = self._excess(harms)
        if excess <= 1:
            return excess
        if self.best is None or excess < self.best.excess:
            self._keep_as_best(audit, excess)
        said = [
            harms[name].too_high()
            for name, bound in self.bounds.items()
            if not harms[name].high <= bound
        ]
        self.run.observer.notice(f"Certified, but {', '.join(said)}: retention goes up.")
        return excess

    # ------------------------------------------------------------ when nothing improves

    def _is_stuck(self) -> bool:
        """For a while, as things are, neither the loss nor the count under the line has fallen."""
        learner = self.run.learner
        rank, retention = learner.adapter.rank, learner.retention_weight
        here = [e for e in self.run.curve if (e.rank, e.retention) == (rank, retention)]
        before, lately = here[:-PATIENCE_EPOCHS], here[-PATIENCE_EPOCHS:]
        return bool(before) and (
            min(e.n_under for e in lately) >= min(e.n_under for e in before)
            and min(e.nll_nats for e in lately) >= 0.99 * min(e.nll_nats for e in before)
        )

    def _give_room(self) -> None:
        """Raise the rank where that is left to us; else hold on less tightly to general text."""
        learner, notice = self.run.learner, self.run.observer.notice
        if self.run.config.rank == "auto" and learner.adapter.rank < self.run.max_rank:
            learner.grow(min(2 * learner.adapter.rank, self.run.max_rank))
            notice(f"No progress: rank raised to {learner.adapter.rank}.")
        else:
            self._hold_looser()

    def _hold_looser(self) -> None:
        learner = self.run.learner
        if learner.retention.weight:
            learner.retention.weight /= 4
            self.run.observer.notice(
                f"No progress: retention lowered to {learner.retention.weight:g}."
            )


def _flips(audit: Audit) -> float:
    return audit.flips_per_1000 or 0.0


def _failed(audit: Audit) -> str:
    """How many records failed; of one, which, and how: who waits wonders."""
    failed = [record for record in audit.records if not record.certified]
    if len(failed) > 1:
        return str(len(failed))
    said = "" if failed[0].n_under else ", recited wrongly"
    return f"1 ({failed[0].id}, lowest p {failed[0].min_p:.2f}{said})"


def losses(run: Run, rows: Sequence[int]) -> list[tuple[list[int], Tensor]]:
    """The NLL of target tokens of the engine's examples with the adapter; see `target_losses`."""
    return target_losses(run.trainer.engine, run.learner.adapter, rows)
