"""`diff`: what an update has to change, in one adapter or in shards, and how long it will take."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memlaw.certify.certificate import Certificate, read_certificate
from memlaw.certify.joined import other_parts
from memlaw.core.errors import AdapterError, MemlawError
from memlaw.core.files import CERTIFICATE_FILE
from memlaw.core.observer import Observer
from memlaw.data.record import Record
from memlaw.measure.adapter_folder import AdapterFolder
from memlaw.settings.given import settled
from memlaw.settings.update import UpdateConfig
from memlaw.shards.layout import index_key, read_index, shard_folder
from memlaw.shards.spreading import place
from memlaw.writer.changes import Changes, changes, cost_s, finished_folder, own_base
from memlaw.writer.folder import whole_of
from memlaw.writer.private import read_private_records
from memlaw.writer.records import known_records


def diff(
    out: str | Path,
    data: Any,
    config: UpdateConfig | None = None,
    *,
    observer: Observer | None = None,
    **settings: Any,
) -> Changes:
    """What an update would have to change so that what is in `out` says exactly `data`.

    Args:
        out: a folder that `write` or `write_shards` finished.
        data: records: a path, or Python objects; see `read_records`.
        config: the settings; or give them by name. Of a `model` its hash is compared.
        observer: is told of what isn't usual.
        **settings: fields of `UpdateConfig`, instead of `config`.

    Raises:
        MemlawError: a child that says what is wrong: no such folder, another base model, data that
            can't be read or contradict themselves.
    """
    config, observer = settled(UpdateConfig, config, settings), observer or Observer()
    folder = finished_folder(Path(out))
    if (whole := whole_of(Path(out))) is not None:
        observer.notice(
            f"{out} is a shard of {whole}: what is in others isn't known here. Name {whole}."
        )
    if config.model is not None:
        own_base(folder, config.over(folder.run), observer)
    how = config.over(folder.run)
    records = known_records(data, how, observer)
    found = changes(folder, records, observer)
    if how.skip_bad and not found.nothing:
        observer.notice(
            "Rows that only the tokenizer refuses aren't known here: an update leaves them out, "
            "and forgets the record that such a row takes the place of."
        )
    if "shards" in folder.run:
        require_own_shards(folder)
        found = dataclasses.replace(found, cost_s=_shards_cost_s(folder, found, records))
    return found


def require_own_shards(folder: AdapterFolder) -> tuple[Certificate, dict[str, Certificate]]:
    """The certificate over all, and the shards' own.

    Raises:
        AdapterError: it was joined from others.
    """
    assert folder.path is not None
    whole = read_certificate(folder.path / CERTIFICATE_FILE)
    parts = {
        name: read_certificate(path)
        for name in whole.adapters or {}
        if (path := shard_folder(folder.path, name) / CERTIFICATE_FILE).is_file()
    }
    if found := other_parts(whole, parts):
        raise AdapterError(
            f"{folder.path} isn't what it was certified as ({found[0]}). Put its shards back as "
            "they were, or write anew with 'memlaw write'."
        )
    return whole, parts


def parts_of(
    folder: AdapterFolder, found: Changes, records: Sequence[Record]
) -> tuple[dict[str, list[Record]], set[str]]:
    """Each shard's records from now on, and the shards that change, be it that they go.

    Args:
        folder: of shards, with the key to its index.
        found: what is other in `records` than in it.
        records: what is to be recited.

    Raises:
        MemlawError: the index or its key can't be read.
    """
    assert folder.path is not None
    index, key = read_index(folder.path), index_key(folder.path)
    parts: dict[str, list[Record]] = {name: [] for name in index.adapters}
    added = []
    for record in records:
        if (name := index.adapter_of(record.prompt, key)) is None:
            added.append(record)
        else:
            parts[name].append(record)
    moving = [new for _, new in found.replaced] + list(found.removed)
    changing = {name for r in moving if (name := index.adapter_of(r.prompt, key)) is not None}
    for name, more in place(parts, added, folder.run["shards"]["asked"]).items():
        parts.setdefault(name, []).extend(more)
        changing.add(name)
    return {name: part for name, part in parts.items() if part}, changing


def _shards_cost_s(
    folder: AdapterFolder, found: Changes, records: Sequence[Record]
) -> float | None:
    """What the shards that change cost, one after the other, and what stands over all of them.

    A new shard costs what another does for as many records. None: it isn't on record, or the folder
    isn't whole, so that `update_shards` would refuse.
    """
    if found.nothing:
        return 0.0
    assert folder.path is not None
    if read_private_records(folder.path) is None:
        return None
    try:
        parts, changing = parts_of(folder, found, records)
        total_s = float(folder.run["timings"].get("joining_s") or 0)
        for name, part in parts.items():
            if name not in changing:
                continue
            path = shard_folder(folder.path, name)
            if path.is_dir():
                shard = finished_folder(path)
                change = changes(shard, part, Observer())
            else:
                shard = finished_folder(shard_folder(folder.path, next(iter(parts))))
                change = Changes(added=tuple(part))
            took_s = cost_s(shard.run, change, len(part))
            if took_s is None:
                return None
            total_s += took_s
        return total_s
    except (MemlawError, LookupError, TypeError, ValueError):
        return None
