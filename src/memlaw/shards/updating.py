"""`update_shards`: a folder of shards is brought in step with its data, at once or not at all.

Only shards with a record that changes are trained; the others are taken over as they are, bytes and
certificates. A shard that loses its last record is dropped: nothing of it is left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlaw.certify.certificate import Certificate, read_certificate
from memlaw.certify.joined import joined_otherwise
from memlaw.core.commitment import kept_key
from memlaw.core.errors import OutputError
from memlaw.core.files import CERTIFICATE_FILE, made
from memlaw.core.first_time import Stopwatch
from memlaw.core.folders import folder_beside, linked_tree
from memlaw.core.locks import locked
from memlaw.core.observer import Observer
from memlaw.data.bad_rows import BadRows
from memlaw.data.record import Record
from memlaw.data.texts import general_texts
from memlaw.measure.adapter_folder import AdapterFolder
from memlaw.measure.forgotten import Forgotten
from memlaw.model.base import BaseModel
from memlaw.settings.given import settled
from memlaw.settings.update import UpdateConfig
from memlaw.settings.write import WriteConfig
from memlaw.shards.diffing import parts_of, require_own_shards
from memlaw.shards.finishing import Shard, finish
from memlaw.shards.layout import shard_folder
from memlaw.writer.changes import Changes, changes, finished_folder, own_base
from memlaw.writer.folder import GENERATIONS
from memlaw.writer.history import generations_of
from memlaw.writer.private import read_private_records
from memlaw.writer.records import records_of, usable_records, write_skipped
from memlaw.writer.run import write_records
from memlaw.writer.updating import next_generation, take, target_of


@dataclass(frozen=True, kw_only=True)
class ShardsUpdate:
    """What `update_shards` did.

    Attributes:
        changes: what was other in the data.
        trained: the shards that were trained, the last of them the one that wasn't good enough, if
            one wasn't.
        dropped: the shards that have no record any more.
        certificate: of the new generation; None: nothing had to change, or it was refused.
        shards: what each shard is now; empty likewise.
        forgotten: what is left of each removed record whose shard was trained.
        taken: the folder holds the new generation now.
    """

    changes: Changes
    trained: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    certificate: Certificate | None = None
    shards: dict[str, Shard] = dataclasses.field(default_factory=dict)
    forgotten: tuple[Forgotten, ...] = ()
    taken: bool = False

    @property
    def succeeded(self) -> bool:
        """The folder says exactly the data."""
        return self.taken or self.changes.nothing


def update_shards(
    out: str | Path,
    data: Any,
    config: UpdateConfig | None = None,
    *,
    new: str | Path | None = None,
    observer: Observer | None = None,
    **settings: Any,
) -> ShardsUpdate:
    """Change a folder of shards so that it says exactly `data`: see `update`.

    Args:
        out: a folder that `write_shards` finished.
        data, config, new, observer, **settings: as of `update`.

    Raises:
        MemlawError: a child that says what is wrong; nothing has changed then.
    """
    config, observer = settled(UpdateConfig, config, settings), observer or Observer()
    watch, out = Stopwatch(), Path(out)
    target = target_of(out, new)
    with locked(out):
        folder = finished_folder(out)
        if read_private_records(out) is None:
            raise OutputError(
                f"{out} has no private records, and so nobody can tell which shards change. Fetch "
                "its private folder again, or write anew with --shards."
            )
        whole, parts = require_own_shards(folder)
        how = config.over(folder.run).resolved()
        bad = BadRows()
        records = records_of(data, how, bad, observer)
        found = changes(folder, records, observer)
        is_joined = not joined_otherwise(whole, parts)
        if found.nothing and is_joined:
            bad.settle(len(records), skip=how.skip_bad, notice=observer.notice)
            return ShardsUpdate(changes=found)
        base = own_base(folder, how, observer)
        clock = folder.run.get("rendering", {}).get("clock")
        records, _, how = usable_records(records, base, how, bad, observer, clock=clock)
        found = changes(folder, records, observer)
        if found.nothing and is_joined:  # what is other in the data can't be used
            return ShardsUpdate(changes=found)
        with folder_beside(target) as work:
            result = _made(folder, found, records, how, config, base, work, observer, watch)
            if result.certificate is None:
                return result
            write_skipped(work, bad)
            take(work, target, folder, in_place=new is None, changes=found, observer=observer)
            return dataclasses.replace(result, taken=True)


def _made(
    folder: AdapterFolder,
    found: Changes,
    records: Sequence[Record],
    how: WriteConfig,
    config: UpdateConfig,
    base: BaseModel,
    work: Path,
    observer: Observer,
    watch: Stopwatch,
) -> ShardsUpdate:
    """Make the next generation in `work`; without a certificate where a shard isn't good enough."""
    assert folder.path is not None
    parts, changing = parts_of(folder, found, records)
    _require_certified(folder.path, [name for name in parts if name not in changing])
    result = ShardsUpdate(
        changes=found,
        trained=tuple(name for name in parts if name in changing),
        dropped=tuple(name for name in changing if name not in parts),
    )
    left: list[Forgotten] = []
    forgotten: dict[str, Any] = {}
    for n, (name, part) in enumerate(parts.items()):
        place_of, then = shard_folder(work, name), shard_folder(folder.path, name)
        made(place_of.parent)
        if name not in changing:
            linked_tree(then, place_of, but=GENERATIONS)
            continue
        observer.notice(f"{name} ({n + 1} of {len(parts)}): {len(part):,} record(s).")
        if then.is_dir():
            made(place_of)
            of_shard = finished_folder(then)
            written, more = next_generation(
                of_shard,
                changes(of_shard, part, observer),
                part,
                how,
                forget=config.forget,
                base=base,
                bad=BadRows(),
                work=place_of,
                observer=observer,
                watch=Stopwatch(),
            )
            left += more
            forgotten |= {name: lines} if (lines := _forgotten_of(place_of)) else {}
        else:
            written = write_records(
                part,
                place_of,
                how,
                base=base,
                texts=general_texts(how.retain, how.damage_text),
                bad=BadRows(),
                observer=observer,
                watch=Stopwatch(),
                clock=folder.run.get("rendering", {}).get("clock"),
            )
        if not (written.succeeded and all(one.holds for one in left)):
            done = result.trained[: result.trained.index(name) + 1]
            return dataclasses.replace(result, trained=done, forgotten=tuple(left))
    certificate, shards = finish(
        work,
        parts,
        base,
        how,
        {"asked": folder.run["shards"]["asked"]},
        kept_key(work),
        watch,
        changed=found.counts,
        earlier=generations_of(folder.run),
        forgotten=forgotten,
    )
    return dataclasses.replace(
        result, certificate=certificate, shards=shards, forgotten=tuple(left)
    )


def _require_certified(out: Path, names: Sequence[str]) -> None:
    """Raise OutputError where a shard that nothing changes in isn't certified: it would stay so."""
    for name in names:
        certificate = read_certificate(shard_folder(out, name) / CERTIFICATE_FILE)
        if not certificate.certified:
            raise OutputError(
                f"{shard_folder(out, name)} isn't certified ({certificate.n_certified} of "
                f"{certificate.n_records} records). First repeat the 'memlaw write' that it was "
                "begun with, with --resume and --max-epochs N."
            )


def _forgotten_of(shard: Path) -> Any:
    return generations_of(AdapterFolder(shard).run)[-1].get("forgotten")
