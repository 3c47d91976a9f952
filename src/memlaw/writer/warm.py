"""An update's start: where the last generation ended, with a penalty on leaving it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from memlaw.data.record import Example
from memlaw.model.formats import saved_factors
from memlaw.train.keeping import Keeping
from memlaw.train.precondition import record_inputs
from memlaw.train.retention import Term
from memlaw.writer.private import read_learner
from memlaw.writer.setup import general_moments
from memlaw.writer.state import Run

KEEP = 3000.0  # what a nat on each token of the written records weighs, beside a step's mean loss
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
    learner, rank = run.learner, run.learner.adapter.rank
    memory, values = read_learner(folder) or ({}, {})
    learner.start_from(saved_factors(folder, run.sites), memory)
    if learner.holding:
        learner.holding.start_warm(learner.adapter, values.get("gate"))
    if run.config.rank == "auto" and rank > learner.adapter.rank:
        learner.grow(rank)
    hashes = [example.record.sha256 for example in run.examples]
    written = [row for row, found in enumerate(hashes) if found in unchanged]
    new = [row for row, found in enumerate(hashes) if found not in unchanged]
    if written:
        terms = _as_written(run, [run.examples[row] for row in written])
        learner.keeping = Keeping(learner.adapter, terms, KEEP)
    if run.lost is not None:
        first = len(run.trainer.engine.examples) - len(run.lost.examples)
        learner.forgetting = run.lost.forgetting(run.subject, first, run.config.seed)
    learner.train_on(new or written[:: -(-len(written) // _COMPANY)])


def _as_written(run: Run, written: list[Example]) -> list[Term]:
    """Retention's terms, with what the sites read on written records for what they read there."""
    base, adapter = run.base, run.learner.adapter
    terms = run.learner.retention.terms
    if not terms:  # nothing is retained, but written records are held all the same
        general = general_moments(base, run.sites, run.retained, seed=run.config.seed)
        terms = [Term(sites=[i], reads=[x], writes=[g]) for i, (x, g) in enumerate(general)]
    reads = record_inputs(base.model, run.sites, written)
    return [
        replace(term, reads=[reads[site] for site in term.sites]).whitened(adapter)
        for term in terms
    ]
