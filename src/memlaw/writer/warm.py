"""An update's start: where the last generation ended, with a penalty on leaving it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from memlaw.model.formats import saved_factors
from memlaw.train.keeping import CALM, HELD, Keeping, narrowed, odds_gradients
from memlaw.train.precondition import record_inputs
from memlaw.train.retention import Term
from memlaw.writer.goals import losses
from memlaw.writer.private import read_learner
from memlaw.writer.state import Run

KEEP = 150.0  # what half the mean square that written log-odds move weighs, beside a mean loss
_ROOM = 16  # columns, at least, in which a few changes are learnt; of a small adapter, half as many
_COMPANY = 10  # written records that are trained beside what is to be forgotten, if nothing else is


def start_warm(run: Run, folder: Path, unchanged: Collection[str]) -> None:
    """Let a run start from a folder's adapter, and train what is new.

    Args:
        run: nothing of it is trained yet.
        folder: of a finished run with the same base model.
        unchanged: hashes of the records that its adapter recites.

    Raises:
        AdapterError: the folder's adapter can't be read, or sits elsewhere.
    """
    run.anew = False
    learner, planned = run.learner, run.learner.adapter.rank
    memory, values = read_learner(folder) or ({}, {})
    learner.start_from(saved_factors(folder, run.sites), memory)
    stored = learner.adapter.rank
    if run.config.rank == "auto" and planned > stored:
        learner.grow(planned)
    hashes = [example.record.sha256 for example in run.examples]
    written = [row for row, found in enumerate(hashes) if found in unchanged]
    new = [row for row, found in enumerate(hashes) if found not in unchanged]
    gate = values.get("gate")
    gate = gate if gate is not None and gate < stored else None
    if written:
        terms = _as_written(run, written)
        n_changed = len(new) + (len(run.lost.records) if run.lost else 0)
        most = run.max_rank if run.config.rank == "auto" else run.config.rank
        if learner.holding and gate is None:  # there will be one, of a column of its own
            most -= 1
        stood = values.get("still", 0)
        run.stood = stood if stood < stored else 0
        still = run.stood = _make_room(run, terms, written, n_changed, stored, most)
        rates: dict[str, float] = {}
        if n_changed <= len(written):
            rates = {"beside": HELD, "calm": HELD} if learner.holding else {"calm": CALM}
        learner.keeping = Keeping(learner.adapter, terms, KEEP, still, **rates)
    if learner.holding:
        learner.holding.start_warm(learner.adapter, gate, values.get("push"))
    if run.lost is not None:
        first = len(run.trainer.engine.examples) - len(run.lost.examples)
        learner.forgetting = run.lost.forgetting(run.subject, first, run.config.seed)
    learner.train_on(new or written[:: -(-len(written) // _COMPANY)])


def _make_room(
    run: Run,
    terms: Sequence[Term],
    written: Sequence[int],
    n_changed: int,
    stored: int,
    most: int,
) -> int:
    """Put columns into the adapter in which changes are learnt, the others standing still.

    Those in which earlier changes were learnt, if there are enough. Otherwise new ones, as many as
    stand still, if so much rank is allowed; or, where none is, what is written is narrowed, if that
    can't be told from what it recites.

    Args:
        run: its adapter recites what is written; `stood` of its columns haven't been trained since
            all were.
        terms: of that, in the coordinates that A is trained in.
        written: its rows.
        n_changed: records that are added, replaced or removed.
        stored: columns that are written; the adapter may have empty ones behind them.
        most: how many there may be.

    Returns:
        How many columns stand still; 0 where so much changes, or so little rank is left, that all
        are trained.
    """
    learner, rank = run.learner, run.learner.adapter.rank
    if n_changed > len(written):
        return 0
    first = run.stood or stored  # columns in which most is written
    room = max(min(_ROOM, -(-first // 2)), -(-first * n_changed // len(written)))
    if run.stood and run.stood + room <= rank:
        still = run.stood
    elif stored + room <= most:
        still, rank = stored, max(rank, stored + room, min(stored + first, most))
    elif rank > room and not learner.holding:  # a gate has a column of its own
        still, n_under = rank - room, _n_under(run, written)
        wide, learner.adapter = learner.adapter, narrowed(learner.adapter, terms, still)
        if _n_under(run, written) > n_under:
            learner.adapter = wide
            return 0
    else:
        return 0
    learner.adapter = learner.adapter.grown(rank)
    learner.solver = learner.new_solver()  # what stands still has no momentum
    return still


def _n_under(run: Run, rows: Sequence[int]) -> int:
    """Tokens of some records that are under the line."""
    line = run.learner.seen.line_p
    return sum(int((torch.exp(-nll) < line).sum()) for _, nll in losses(run, rows))


def _as_written(run: Run, rows: Sequence[int]) -> list[Term]:
    """A form of how far an adapter moves the log-odds of written records' target tokens.

    Half their mean square, as far as it is told by what the sites read on records and, apart from
    that, by the gradients at their outputs.
    """
    written = [run.examples[row] for row in rows]
    with run.learner.adapter.folded().attached(run.base.model):  # upper sites read what lower add
        engine = run.trainer.engine
        reads = record_inputs(run.base.model, run.sites, written, engine, rows)
    writes = odds_gradients(run.trainer.engine, run.learner.adapter, rows, seed=run.config.seed)
    alone = [(i,) for i in range(len(run.sites))]
    together = dict.fromkeys(tuple(term.sites) for term in run.learner.retention.terms) or alone
    return [
        Term(sites=at, reads=[reads[i] for i in at], writes=[writes[i] for i in at]).whitened(
            run.learner.adapter
        )
        for at in together
    ]
