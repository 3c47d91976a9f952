"""Which record goes to which shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Literal

from memlaw.core.errors import ConfigError
from memlaw.data.record import Record, texts_of

Shards = int | Literal["auto"]
MOST_RECORDS = 200
MOST_BYTES = 32_000  # of prompts and completions, UTF-8


def share(record: Record) -> float:
    """How much of a shard a record fills, where their number is left to us."""
    text = "".join([*texts_of(record.prompt), record.completion])
    return max(1 / MOST_RECORDS, len(text.encode()) / MOST_BYTES)


def spread(records: Sequence[Record], shards: Shards) -> dict[str, list[Record]]:
    """Records by the name of their shard, in their order, shards filled alike.

    Args:
        records: at least one.
        shards: how many; auto: as many as none of them is overfull, unless by a single record.

    Raises:
        ConfigError: more shards than records, or less than one.
    """
    if shards == "auto":
        sizes = [share(record) for record in records]
        n = max(1, round(sum(sizes) + 0.499))
    else:
        sizes, n = [1.0] * len(records), shards
        if not 1 <= n <= len(records):
            raise ConfigError(
                f"{n} shards for {len(records)} record(s). Give 1 to {len(records)}, or auto."
            )
    total, found = sum(sizes), dict[int, list[Record]]()
    for record, size, end in zip(records, sizes, accumulate(sizes), strict=True):
        middle = (end - size / 2) / total
        found.setdefault(min(n - 1, int(middle * n)), []).append(record)
    return {shard_name(number): part for number, part in enumerate(found.values(), 1)}


def place(
    there: Mapping[str, Sequence[Record]], added: Sequence[Record], shards: Shards
) -> dict[str, list[Record]]:
    """Added records by the name of their shard: the emptiest, or a new one where all are full.

    Args:
        there: what each shard keeps; a shard without records is gone.
        added: what is new.
        shards: as it was asked for at first; of a number of shards none is ever full.
    """
    filled = {name: sum(map(share, records)) for name, records in there.items() if records}
    number = max((int(name.rpartition("-")[2]) for name in there), default=0)
    found: dict[str, list[Record]] = {}
    for record in added:
        name = min(filled, key=lambda name: filled[name], default=None)
        if name is None or (shards == "auto" and filled[name] + share(record) > 1 + 1e-9):
            number += 1
            name = shard_name(number)
        found.setdefault(name, []).append(record)
        filled[name] = filled.get(name, 0.0) + share(record)
    return found


def shard_name(number: int) -> str:
    """The name of a shard, from 1: what a server calls its adapter."""
    return f"shard-{number:04}"
