"""`update`: a finished folder is brought in step with its data, at once or not at all."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlaw.certify.certificate import read_certificate
from memlaw.core.errors import ConfigError, OutputError
from memlaw.core.files import CERTIFICATE_FILE, made, writing
from memlaw.core.first_time import Stopwatch
from memlaw.core.folders import exchange, folder_beside, require_exchangeable, restore
from memlaw.core.locks import locked
from memlaw.core.observer import Observer
from memlaw.data.bad_rows import BadRows
from memlaw.data.record import Record
from memlaw.data.texts import general_texts, sha256_of
from memlaw.measure.adapter_folder import AdapterFolder
from memlaw.measure.forgotten import Forgotten
from memlaw.model.base import BaseModel
from memlaw.settings.given import settled
from memlaw.settings.update import Forget, UpdateConfig
from memlaw.settings.write import WriteConfig
from memlaw.writer.changes import Changes, changes, finished_folder, own_base
from memlaw.writer.folder import (
    carry_over,
    check_out,
    others_files,
    require_no_part,
)
from memlaw.writer.forgetting import forgotten_json
from memlaw.writer.goals import DEAR, Goals
from memlaw.writer.handover import hand_over
from memlaw.writer.history import generations_of, keep_generations
from memlaw.writer.mean_goals import MeanGoals
from memlaw.writer.records import records_of, usable_records
from memlaw.writer.result import WriteResult
from memlaw.writer.run import train
from memlaw.writer.state import Run
from memlaw.writer.update_goals import UpdateGoals, UpdateMeanGoals
from memlaw.writer.warm import start_warm

_WORTH = 0.5  # of what training anew costs: so much may a change cost, until that is done instead
_FEW = 50  # records: with fewer, setting up costs more than training


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """What `update` did.

    Attributes:
        changes: what was other in the data.
        written: what was made; None: nothing had to change.
        forgotten: what is left of each removed record.
        taken: the folder holds it now. If not, it wasn't good enough, and the folder is as it was.
    """

    changes: Changes
    written: WriteResult | None = None
    forgotten: tuple[Forgotten, ...] = ()
    taken: bool = False

    @property
    def is_forgotten(self) -> bool:
        """Nothing was found of what is removed."""
        return all(one.holds for one in self.forgotten)

    @property
    def succeeded(self) -> bool:
        """The folder says exactly the data."""
        return self.taken or self.changes.nothing


def update(
    out: str | Path,
    data: Any,
    config: UpdateConfig | None = None,
    *,
    new: str | Path | None = None,
    observer: Observer | None = None,
    **settings: Any,
) -> UpdateResult:
    """Change a folder's adapter so that it says exactly `data`, certified like one written anew.

    In place it is all or nothing: until the new generation is whole and certified, within the
    bounds on harm, the folder is the old one.

    Args:
        out: a folder that `write` finished.
        data: the records that its adapter is to recite: a path, or Python objects.
        config: the settings; or give them by name.
        new: a new or empty folder for the result; `out` stays as it is. Default: in place.
        observer: is told of progress.
        **settings: fields of `UpdateConfig`, instead of `config`.

    Raises:
        MemlawError: a child that says what is wrong; nothing has changed then.
    """
    config, observer = settled(UpdateConfig, config, settings), observer or Observer()
    watch, out = Stopwatch(), Path(out)
    target = target_of(out, new)
    if new is None:
        require_no_part(out)
    with locked(out):
        folder = finished_folder(out)
        if "shards" in folder.run:
            raise OutputError(f"{out} holds shards: memlaw.update_shards updates it.")
        how = config.over(folder.run).resolved()
        bad = BadRows()
        records = records_of(data, how, bad, observer)
        found = changes(folder, records, observer)
        if found.nothing:
            bad.settle(len(records), skip=how.skip_bad, notice=observer.notice)
            if folder.run.get("status") != "certified":
                observer.notice(
                    f"{out} isn't certified. To go on with its training, use 'memlaw write' with "
                    "--resume and the settings that it was begun with."
                )
            return UpdateResult(changes=found)
        require_known(folder, found, config.forget)
        base = own_base(folder, how, observer)
        if how.skip_bad:  # else the run refuses what the tokenizer does
            seen, clock = bad.copy(), folder.run.get("rendering", {}).get("clock")
            usable, _, _ = usable_records(records, base, how, seen, Observer(), clock=clock)
            found = changes(folder, usable, Observer())  # what is to be told the run tells
            if found.nothing:  # what is other in the data can't be used
                seen.copy().settle(len(usable), skip=True, notice=observer.notice)
                return UpdateResult(changes=found)
        with folder_beside(target) as work:
            written, left = next_generation(
                folder,
                found,
                records,
                how,
                forget=config.forget,
                base=base,
                bad=bad,
                work=work,
                observer=observer,
                watch=watch,
            )
            result = UpdateResult(
                changes=found,
                written=dataclasses.replace(written, out=target),
                forgotten=tuple(left),
            )
            if not (written.succeeded and result.is_forgotten):
                return result
            take(work, target, folder, in_place=new is None, changes=found, observer=observer)
            return dataclasses.replace(result, taken=True)


def target_of(out: Path, new: str | Path | None) -> Path:
    """Where an update's result goes, seen to be usable before anything is done.

    Args:
        out: the folder that is updated; what a killed update left of it is put right.
        new: a new or empty folder; None: in place.

    Raises:
        MemlawError: `out` isn't finished, or `new` holds something.
    """
    restore(out)
    finished_folder(out)
    if new is None:
        require_exchangeable(out)
        return out.resolve()
    check_out(Path(new), resume=False)
    made(Path(new).absolute().parent)
    return Path(new).resolve()


def take(
    work: Path,
    target: Path,
    folder: AdapterFolder,
    *,
    in_place: bool,
    changes: Changes,
    observer: Observer,
) -> None:
    """Put the next generation where it belongs, in one step.

    Args:
        work: it, whole.
        target: where it goes.
        folder: the generation before it.
        in_place: that one is replaced; it is kept among the earlier ones, unless it recites what
            was removed. What isn't memlaw's in it stays where it is.
        changes: between the two.
        observer: is told of what stays behind a removal.
    """
    if not in_place:
        with writing(target):
            os.replace(work, target)
        return
    if changes.removed or changes.lost:
        if others := others_files(target):
            observer.notice(
                f"{target} also holds what isn't memlaw's to drop, and may say what was removed: "
                f"{', '.join(others[:5])}{' and more' if len(others) > 5 else ''}."
            )
    else:
        assert folder.path is not None
        keep_generations(folder.path, work, len(generations_of(folder.run)))
    carry_over(target, work)
    exchange(work, target)


def require_known(folder: AdapterFolder, found: Changes, forget: Forget) -> None:
    """Raise ConfigError where something is to be forgotten, and nobody knows what."""
    if found.lost and forget != "rewrite":
        raise ConfigError(
            f"{len(found.lost)} record(s) of {folder.path} aren't in the data, and without its "
            "private records nobody knows what is to be forgotten. Use --forget rewrite, or bring "
            "private/records.jsonl back."
        )


def next_generation(
    folder: AdapterFolder,
    found: Changes,
    records: Sequence[Record],
    how: WriteConfig,
    *,
    forget: Forget,
    base: BaseModel,
    bad: BadRows,
    work: Path,
    observer: Observer,
    watch: Stopwatch,
) -> tuple[WriteResult, list[Forgotten]]:
    """Make the next generation of a folder in an empty one, whether it is good enough or not.

    Args:
        folder: a finished run's; nothing in it is changed.
        found: what is other in `records` than in it.
        records: what its adapter is to recite.
        how: resolved settings.
        forget: how removed records are forgotten.
        base: the folder's own.
        bad: rows that can't be used so far.
        work: the empty folder.
        observer: is told of progress.
        watch: runs since it was begun.

    Returns:
        What was made, and what is left of each removed record.

    Raises:
        ConfigError: nobody knows what is to be forgotten.
    """
    assert folder.path is not None
    require_known(folder, found, forget)
    given_up_s = 0.0
    if forget == "suppress" and found.is_much:
        observer.notice(
            f"{found.n_changed} of {len(records)} records change, more than a tenth: all are "
            "trained anew."
        )
    elif forget == "suppress":
        tried = Stopwatch()
        run = _begun(folder, found, records, how, base=base, bad=bad, work=work, observer=observer)
        start_warm(run, folder.path, {record.sha256 for record in found.unchanged})
        warm = UpdateMeanGoals(run) if how.holds else UpdateGoals(run)
        warm.most_flop = _WORTH * flop_anew(folder, len(records))
        ended = train(run, warm)
        if ended != DEAR:
            return _finished(run, warm, ended, watch)
        del run, warm
        given_up_s = tried.wall_s - tried.once_s
        observer.notice(
            f"Changing the adapter has cost {_WORTH:.0%} of what training it anew does, and isn't "
            "done: it is trained anew."
        )
    run = _begun(folder, found, records, how, base=base, bad=bad, work=work, observer=observer)
    run.given_up_s = given_up_s
    goals = MeanGoals(run) if how.holds else Goals(run)
    return _finished(run, goals, train(run, goals), watch)


def _begun(
    folder: AdapterFolder,
    found: Changes,
    records: Sequence[Record],
    how: WriteConfig,
    *,
    base: BaseModel,
    bad: BadRows,
    work: Path,
    observer: Observer,
) -> Run:
    """The run of a next generation, nothing of it trained; see `next_generation`."""
    run = Run(
        records=records,
        bad=bad,
        texts=general_texts(how.retain, how.damage_text),
        base=base,
        config=how,
        out=work,
        observer=observer,
        clock=folder.run.get("rendering", {}).get("clock"),
        removed=found.removed,
    )
    if sha256_of(run.texts.unseen) != _unseen_sha256(folder):
        observer.notice(
            "Damage is measured on another text than it was, so that the figures can't be compared."
        )
    run.resumable = False
    run.earlier, run.changed = generations_of(folder.run), found.counts
    return run


def _unseen_sha256(folder: AdapterFolder) -> str:
    """Hash of the text that a folder's damage was measured on."""
    assert folder.path is not None
    return str(read_certificate(folder.path / CERTIFICATE_FILE).damage["text_sha256"])


def _finished(
    run: Run, goals: Goals, ended: str, watch: Stopwatch
) -> tuple[WriteResult, list[Forgotten]]:
    """Hand over a run whose training is over; returns what `next_generation` does."""
    measured = goals.found()
    left = goals.what_is_left()
    if run.lost is not None:
        removed = [example.record for example in run.lost.records]
        run.forgotten = forgotten_json(removed, left, "rewrite" if run.anew else "suppress")
    return hand_over(run, measured, ended, watch), left


def flop_anew(folder: AdapterFolder, n: int) -> float:
    """About what training n records from nothing costs, by the last time that was done here.

    Of few, what a few more would; infinite where it isn't on record, or wasn't done to the end.
    """
    for line in reversed(generations_of(folder.run)):
        if line.get("anew"):
            try:
                flop, n_then = float(line["flop"]), int(line["records"])
                is_whole = line["n_certified"] == n_then > 0 and 0 < flop < math.inf
            except (KeyError, TypeError, ValueError, OverflowError):
                is_whole = False
            return flop * max(n, _FEW) / n_then if is_whole else math.inf
    return math.inf
