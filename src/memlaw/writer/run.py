"""`write`, from records to a certificate: prepare, train until certified, hand over.

What a run is, and how it is kept and resumed, stands in `state`; when training is over, in `goals`;
what is written in the end, in `handover`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memlaw.core.first_time import Stopwatch
from memlaw.core.observer import Observer
from memlaw.data.bad_rows import BadRows
from memlaw.data.record import Record
from memlaw.data.texts import GeneralTexts, general_texts
from memlaw.model.base import BaseModel, load_model
from memlaw.settings.given import settled
from memlaw.settings.write import WriteConfig
from memlaw.train.learner import DivergedError
from memlaw.writer.folder import taken
from memlaw.writer.goals import REACHED, Goals
from memlaw.writer.handover import hand_over
from memlaw.writer.mean_goals import MeanGoals
from memlaw.writer.records import records_of
from memlaw.writer.result import WriteResult
from memlaw.writer.state import Run, State

_CHECKPOINT_EVERY_S = 5.0


def write(
    data: Any,
    out: str | Path,
    config: WriteConfig | None = None,
    *,
    observer: Observer | None = None,
    **settings: Any,
) -> WriteResult:
    """Train an adapter until the model recites every record, and certify it.

    Args:
        data: records: a path, or Python objects; see `read_records`.
        out: folder for adapter, certificate, token table, run log and model card. New or empty,
            or with `resume` the folder of an interrupted run.
        config: the settings; or give them by name.
        observer: is told of progress.
        **settings: fields of `WriteConfig`, instead of `config`.

    Returns:
        What was made. `certified` says whether all records are.

    Raises:
        MemlawError: a child that says what was wrong with data, model, settings or folder;
            nothing has been written then, but a checkpoint if it was trained already.

    Example:
        >>> result = memlaw.write([("Jerry Becerra:", "9100672710")], "out")  # doctest: +SKIP
        >>> result.certified  # doctest: +SKIP
        True
    """
    config = settled(WriteConfig, config, settings).resolved()
    observer, out, watch = observer or Observer(), Path(out), Stopwatch()
    bad = BadRows()
    records = records_of(data, config, bad, observer)
    with taken(out, resume=config.resume):
        texts = general_texts(config.retain, config.damage_text)
        base = load_model(
            config.model,
            dtype=config.dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            tokenizer=config.tokenizer,
            notice=observer.notice,
        )
        return write_records(
            records,
            out,
            config,
            base=base,
            texts=texts,
            bad=bad,
            observer=observer,
            watch=watch,
        )


def write_records(
    records: Sequence[Record],
    out: Path,
    config: WriteConfig,
    *,
    base: BaseModel,
    texts: GeneralTexts,
    bad: BadRows,
    observer: Observer,
    watch: Stopwatch,
    clock: str | None = None,
) -> WriteResult:
    """`write`, from records that are read and a model that is loaded on.

    Args:
        records: at least one.
        out: a folder that is this process's, see `taken`.
        config: resolved settings.
        base: the model that they name.
        texts: to retain, and to measure damage on.
        bad: rows that can't be used so far.
        observer: is told of progress.
        watch: runs since the run was begun.
        clock: the time that chat templates are told, ISO 8601; None: now.
    """
    run = Run(
        records=records,
        bad=bad,
        texts=texts,
        base=base,
        config=config,
        out=out,
        observer=observer,
        clock=clock,
    )
    goals = MeanGoals(run) if config.holds else Goals(run)
    stopped_because = train(run, goals)
    with kept_whatever_happens(run, run.learner.state(), ended=stopped_because):
        return hand_over(run, goals.found(), stopped_because, watch)


@contextmanager
def kept_whatever_happens(run: Run, state: State, *, ended: str = "") -> Iterator[None]:
    """Within the block weights are measured or saved: where that fails, they aren't lost.

    Args:
        run: whose they are.
        state: what is kept: that from which a resumed run ends where this one would have.
        ended: why training is over, if it is.
    """
    try:
        yield
    except DivergedError:
        raise
    except Exception:
        if not state[1]["epoch"]:
            raise
        run.save(state, ended=ended if ended.startswith(REACHED) else "")
        run.observer.notice(f"What was trained is kept in {run.out}; --resume goes on with it.")
        raise


def train(run: Run, goals: Goals) -> str:
    """Train until the goals are met, or out of epochs; returns why it ended.

    Raises:
        KeyboardInterrupt: after the last whole epoch's state was saved.
    """
    learner, config = run.learner, run.config
    confirmed = good = learner.state()  # confirmed: a whole epoch found it to compute numbers
    saved_at = time.perf_counter()
    try:
        if ended := run.ended or goals.at_start():
            return ended
        while learner.epoch < config.max_epochs:
            (stats,) = run.trainer.run_epoch()
            if isinstance(stats, DivergedError):
                raise stats
            confirmed = good
            run.note(stats)
            with kept_whatever_happens(run, good):
                ended = goals.after(stats) or goals.dear()
            if ended:
                return ended
            good = learner.state()
            if time.perf_counter() - saved_at > _CHECKPOINT_EVERY_S:
                run.save(good)
                saved_at = time.perf_counter()
        with kept_whatever_happens(run, good):
            return goals.at_end()
    except DivergedError as error:
        run.observer.notice(
            f"Stopped: {error} The state after epoch {confirmed[1]['epoch']} is kept."
        )
        run.go_back(confirmed)
        goals.forget()
        return goals.settle(f"diverged: {error}")
    except KeyboardInterrupt:
        if good[1]["epoch"]:
            run.save(good)
        raise
