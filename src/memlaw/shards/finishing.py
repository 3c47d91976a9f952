"""What stands over the shards of a folder when they are written: index, certificate, run, card.

The certificate comes last, so that it vouches for what is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlaw.certify.certificate import Certificate, read_certificate
from memlaw.certify.joined import Part, joined_certificate
from memlaw.core.commitment import OPENINGS_FILE, read_key
from memlaw.core.errors import AdapterError, OutputError
from memlaw.core.files import (
    CERTIFICATE_FILE,
    RUN_FILE,
    read_json,
    write_json,
    write_text,
    writing,
)
from memlaw.core.first_time import Stopwatch
from memlaw.core.locks import LOCK_FILE
from memlaw.data.record import Record
from memlaw.model.base import BaseModel
from memlaw.model.provenance import machine, versions
from memlaw.settings.write import WriteConfig
from memlaw.shards.layout import INDEX_FILE, shard_folder, write_index
from memlaw.shards.routing import write_routes
from memlaw.writer.folder import CARD_FILE, CHECKPOINT_FILE, SHARDS_FOLDER
from memlaw.writer.private import write_private

_CARD = """---
library_name: peft
tags: [lora, memlaw, memorization]
---

# {n} records, word for word, in {n_shards} adapters

{statement}

`{index}` says which adapter recites which record, by commitments to the prompts that tell nothing
without the private file beside them. Each adapter in `{shards}` is a folder that PEFT loads, with a
card and a certificate of its own.

```sh
memlaw ask path/to/this/folder "PROMPT"
memlaw audit RECORDS --certificate path/to/this/folder/certificate.json
```

| adapter | records | rank | ΔNLL on unseen text, nats per token |
|---|---|---|---|
{lines}

Whoever has the adapters can make them recite the records. Don't publish what they may not know.
Folders named `private`, and `generations`, hold the records' text and earlier adapters: never
upload them (`.gitignore` leaves them out).
"""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What one shard is, as its folder says.

    Attributes:
        certificate: of its records.
        run: the content of its `run.json`.
        succeeded: certified, and within the bounds that were asked for.
    """

    certificate: Certificate
    run: dict[str, Any]
    succeeded: bool


def read_shard(folder: Path) -> Shard:
    """Read what a written shard is.

    Raises:
        MemlawError: it isn't there, or can't be read.
    """
    return Shard(
        certificate=read_certificate(folder / CERTIFICATE_FILE),
        run=read_json(folder / RUN_FILE, AdapterError, "Write it again."),
        succeeded=not (folder / CHECKPOINT_FILE).is_file(),
    )


def finish(
    out: Path,
    parts: Mapping[str, Sequence[Record]],
    base: BaseModel,
    config: WriteConfig,
    setting: Mapping[str, Any],
    key: bytes,
    watch: Stopwatch,
    *,
    changed: Mapping[str, int] | None = None,
    earlier: Sequence[dict[str, Any]] = (),
    forgotten: Mapping[str, Any] | None = None,
) -> tuple[Certificate, dict[str, Shard]]:
    """Write what stands over the shards; all of them lie in `out` already.

    Args:
        out: the folder.
        parts: each shard's records.
        base: what all were written into.
        config: how.
        setting: of the shards, for `run.json`: how many were asked for.
        key: of the index's and the certificate's commitments.
        watch: runs since it was begun.
        changed: of an update, how many records are added, replaced, removed, unchanged.
        earlier: the lines of the folder's earlier generations.
        forgotten: what was found of removed records, for `run.json`.
    """
    joining = Stopwatch()
    with writing(out):
        for name in parts:  # the note of a process that was killed there
            (shard_folder(out, name) / LOCK_FILE).unlink(missing_ok=True)
    shards = {name: read_shard(shard_folder(out, name)) for name in parts}
    certificate = joined_certificate(
        {
            name: Part(shard.certificate, _key_of(shard_folder(out, name)), parts[name])
            for name, shard in shards.items()
        },
        key,
    )
    records = [record for part in parts.values() for record in part]
    adapters = {
        name: {
            "rank": shard.run["adapter"]["rank"],
            "n_parameters": shard.certificate.n_parameters,
            "sha256": shard.certificate.adapter_sha256,
        }
        for name, shard in shards.items()
    }
    if config.tokenizer is not None:  # each shard has it, too
        with writing(out):
            base.tokenizer.save_pretrained(out)
    write_index(out, parts, key, adapters)
    write_private(out, records, {}, {})
    write_routes(out, parts, base, certificate.prompt_format)
    run = _run_json(out, certificate, shards, base, config, setting, watch)
    timings = run["timings"]
    timings["joining_s"] = joining.wall_s - joining.once_s
    if timings["once_s"] is not None:  # as of shards that an earlier version wrote
        timings["once_s"] += joining.once_s
    run["generations"] = [
        *earlier,
        {
            **run.pop("generation"),
            "number": len(earlier) + 1,
            **(changed or {"added": len(records), "replaced": 0, "removed": 0, "unchanged": 0}),
            **({"forgotten": forgotten} if forgotten else {}),
        },
    ]
    write_json(out / RUN_FILE, run)
    write_text(out / CARD_FILE, _card(certificate, shards))
    write_json(out / CERTIFICATE_FILE, certificate.to_json())
    return certificate, shards


def _key_of(folder: Path) -> bytes:
    key = read_key(folder)
    if key is None:
        raise OutputError(f"{folder / OPENINGS_FILE} isn't here. Fetch it again, or write anew.")
    return key


def _run_json(
    out: Path,
    certificate: Certificate,
    shards: Mapping[str, Shard],
    base: BaseModel,
    config: WriteConfig,
    setting: Mapping[str, Any],
    watch: Stopwatch,
) -> dict[str, Any]:
    """What `run.json` says of all; of what is the same in each shard, what the first says."""
    runs = [shard.run for shard in shards.values()]
    first, wall_s = runs[0], watch.wall_s
    rank = max(run["adapter"]["rank"] for run in runs)
    epochs = max(run["epochs"] for run in runs)
    same = ("tokenizer_sha256", "prompt_format", "rendering", "dtype", "device", "base", "format")
    return {
        "status": "certified" if certificate.certified else "not certified",
        "config": {**config.recorded(), "resume": False},
        **{name: first[name] for name in same},
        "shards": {**setting, "names": list(shards)},
        "records": {
            "n": certificate.n_records,
            "sha256": certificate.records_sha256,
            "n_target_tokens": sum(run["records"]["n_target_tokens"] for run in runs),
        },
        "adapter": {
            "rank": rank,
            "n_parameters": certificate.n_parameters,
            "sha256": certificate.adapter_sha256,
        },
        "timings": {
            "wall_s": wall_s,
            **{
                name: _sum_s(runs, name)
                for name in ("training_s", "audit_s", "forgetting_s", "once_s")
            },
        },
        "epochs": epochs,
        "versions": versions(),
        "machine": machine(),
        "generation": {
            "created": certificate.created,
            "records": certificate.n_records,
            "n_certified": certificate.n_certified,
            "rank": rank,
            "epochs": epochs,
            "damage_nats": certificate.damage["delta_nll_nats"],
            "damage_ci95": list(certificate.damage["delta_nll_ci95"]),
            "specific": certificate.specific,
            "wall_s": wall_s,
            "adapter_sha256": certificate.adapter_sha256,
        },
    }


def _sum_s(runs: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Seconds of all shards together; None: not on record in all of them."""
    found = [run["timings"].get(name) for run in runs]
    return None if None in found else sum(found)


def _card(certificate: Certificate, shards: Mapping[str, Shard]) -> str:
    lines = [
        f"| `{name}` | {shard.certificate.n_certified} of {shard.certificate.n_records} | "
        f"{shard.run['adapter']['rank']} | {shard.certificate.damage['delta_nll_nats']:+.3f} |"
        for name, shard in shards.items()
    ]
    return _CARD.format(
        n=certificate.n_records,
        n_shards=len(shards),
        statement=certificate.statement,
        index=INDEX_FILE,
        shards=SHARDS_FOLDER,
        lines="\n".join(lines),
    )
