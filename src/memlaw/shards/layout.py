"""A folder of shards: where its adapters lie, and which record is in which.

`index.json` names records by salted commitments to their prompts, see `memlaw.core.commitment`: who
hasn't the key can't try a guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlaw.core.commitment import OPENINGS_FILE, commitment, read_key
from memlaw.core.errors import AdapterError, OutputError
from memlaw.core.files import read_json, write_json
from memlaw.data.record import Prompt, Record, prompt_sha256
from memlaw.writer.folder import INDEX_FILE, SHARD_NAME, SHARDS_FOLDER

_FORMAT = 1


def is_sharded(folder: str | Path) -> bool:
    """A folder that `write_shards` has finished."""
    return (Path(folder) / INDEX_FILE).is_file()


def shard_folder(out: Path, name: str) -> Path:
    """Where the shard of a name lies."""
    return out / SHARDS_FOLDER / name


@dataclass(frozen=True, kw_only=True)
class Index:
    """What `index.json` says.

    Attributes:
        adapters: the names, and what there is to know of each: records, rank, hash.
        records: the adapter's name by the commitment to a record's prompt.
    """

    adapters: dict[str, dict[str, Any]]
    records: dict[str, str]

    def adapter_of(self, prompt: Prompt, key: bytes) -> str | None:
        """The adapter that recites the record with this prompt; None: there is no such record."""
        return self.records.get(commitment(key, prompt_sha256(prompt)))


def write_index(
    out: Path,
    parts: Mapping[str, Sequence[Record]],
    key: bytes,
    adapters: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write `index.json`.

    Args:
        out: the folder.
        parts: each shard's records.
        key: of the commitments.
        adapters: what else is said of each shard.
    """
    content = {
        "format": _FORMAT,
        "about": "Which adapter recites which record. A record is named by a commitment to its "
        f"prompt, which {OPENINGS_FILE} opens.",
        "adapters": {
            name: {"folder": f"{SHARDS_FOLDER}/{name}", "records": len(part), **adapters[name]}
            for name, part in parts.items()
        },
        "records": [
            {
                "id": record.id,
                "prompt": commitment(key, prompt_sha256(record.prompt)),
                "adapter": name,
            }
            for name, part in parts.items()
            for record in part
        ],
    }
    write_json(out / INDEX_FILE, content)


def read_index(out: Path) -> Index:
    """Read `index.json`.

    Raises:
        AdapterError: it can't be read, or isn't one.
    """
    path = out / INDEX_FILE
    content = read_json(path, AdapterError, "Fetch it again.")
    try:
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}, and this version reads {_FORMAT}")
        adapters = {str(name): dict(line) for name, line in content["adapters"].items()}
        records = {str(line["prompt"]): str(line["adapter"]) for line in content["records"]}
        if odd := sorted(name for name in adapters if not SHARD_NAME.fullmatch(name)):
            raise ValueError(f"{odd[0]!r:.60} is no shard's name")  # it would lead elsewhere
        if missing := sorted(set(records.values()) - set(adapters)):
            raise ValueError(f"it lists no adapter {missing[0]}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(
            f"{path} is no index of shards ({type(error).__name__}: {error}). Fetch it again."
        ) from error
    return Index(adapters=adapters, records=records)


def index_key(out: Path) -> bytes:
    """The key of the index's and the certificate's commitments.

    Raises:
        OutputError: it isn't here.
        CertificateError: the file holds no key.
    """
    key = read_key(out)
    if key is None:
        raise OutputError(
            f"{out / OPENINGS_FILE} isn't here, and without it nobody can tell which shard a "
            f"record is in. Fetch it again, or name a shard: {shard_folder(out, 'shard-0001')}."
        )
    return key
