"""`update_shards`: a folder of shards is brought in step with its data, at once or not at all.

Only shards with a record that changes are trained; the others are taken over as they are, bytes and
certificates. A shard that loses its last record is dropped: nothing of it is left.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlaw.certify.certificate import Certificate
from memlaw.core.commitment import kept_key
from memlaw.core.errors import OutputError
from memlaw.core.files import made
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
from memlaw.shards.finishing import Shard, finish
from memlaw.shards.layout import index_key, read_index, shard_folder
from memlaw.shards.spreading import place
from memlaw.shards.writing import checked
from memlaw.writer.changes import Changes, changes, finished_folder, own_base
from memlaw.writer.folder import GENERATIONS
from memlaw.writer.history import generations_of
from memlaw.writer.private import read_private_records
from memlaw.writer.records import records_of
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
    started, out = time.perf_counter(), Path(out)
    target = target_of(out, new)
    with locked(out):
        folder = finished_folder(out)
        if read_private_records(out) is None:
            raise OutputError(
                f"{out} has no private records, and so nobody can tell which shards change. Fetch "
                "its private folder again, or write anew with --shards."
            )
        how = config.over(folder.run).resolved()
        bad = BadRows()
        records = records_of(data, how, bad, observer)
        found = changes(folder, records, observer)
        if found.nothing:
            return ShardsUpdate(changes=found)
        base = own_base(folder, how, observer)
        records, _, how = checked(records, base, how, bad, observer)
        found = changes(folder, records, observer)
        with folder_beside(target) as work:
            result = _made(folder, found, records, how, config, base, work, observer, started)
            if result.certificate is None:
                return result
            take(work, target, folder, in_place=new is None, changes=found)
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
    started: float,
) -> ShardsUpdate:
    """Make the next generation in `work`; without a certificate where a shard isn't good enough."""
    assert folder.path is not None
    asked = folder.run["shards"]
    parts, changing = _parts(folder.path, found, records, asked["asked"])
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
                started=time.perf_counter(),
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
                started=time.perf_counter(),
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
        {"asked": asked["asked"]},
        kept_key(work),
        started,
        changed=found.counts,
        earlier=generations_of(folder.run),
        forgotten=forgotten,
    )
    return dataclasses.replace(
        result, certificate=certificate, shards=shards, forgotten=tuple(left)
    )


def _forgotten_of(shard: Path) -> Any:
    return generations_of(AdapterFolder(shard).run)[-1].get("forgotten")


def _parts(
    out: Path, found: Changes, records: Sequence[Record], asked: Any
) -> tuple[dict[str, list[Record]], set[str]]:
    """Each shard's records from now on, and the shards that change, be it that they go."""
    index, key = read_index(out), index_key(out)
    parts: dict[str, list[Record]] = {name: [] for name in index.adapters}
    added = []
    for record in records:
        if (name := index.adapter_of(record.prompt, key)) is None:
            added.append(record)
        else:
            parts[name].append(record)
    moving = [new for _, new in found.replaced] + list(found.removed)
    changing = {name for r in moving if (name := index.adapter_of(r.prompt, key)) is not None}
    for name, more in place(parts, added, asked).items():
        parts.setdefault(name, []).extend(more)
        changing.add(name)
    return {name: part for name, part in parts.items() if part}, changing
