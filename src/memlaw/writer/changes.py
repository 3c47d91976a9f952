"""What must change so that an adapter says exactly some data: found by identity, nothing trained.

A record's identity is its prompt; prompt and completion together make the hash that certificates
have. Without the private records only hashes are known: a record of the certificate that the data
don't have is then *lost*, and whether it was replaced or removed can't be told.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlaw.certify.certificate import CertifiedRecord, read_certificate
from memlaw.core.commitment import OPENINGS_FILE, PRIVATE_FOLDER, commitment, read_key
from memlaw.core.errors import AdapterError, DataError, OutputError
from memlaw.core.files import CERTIFICATE_FILE
from memlaw.core.observer import Observer
from memlaw.data.attempts import N_ATTEMPTS
from memlaw.data.record import Prompt, Record, prompt_sha256
from memlaw.measure.adapter_folder import AdapterFolder
from memlaw.measure.forgotten import N_SAMPLES
from memlaw.model.base import BaseModel, load_model
from memlaw.model.tokenizer import with_tokenizer
from memlaw.settings.write import WriteConfig
from memlaw.writer.private import RECORDS_FILE, read_private_records

# A twentieth of 200 records costs an eighth of training them anew; an eighth of 320 wasn't done at
# half, nor a fifth of 200.
_MANY, _MUCH = 100, 1 / 10
_BATCH = 25  # fewer records take nearly as long, but for training: 12 audits 2.4 s, 100 15 s
_STEP = 10  # records: fewer take as many steps
_NOT_EACH_TIME = ("given_up_s", "forgetting_s", "once_s")  # of what a generation took


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What is other in the data than in the folder.

    Attributes:
        added: records with a prompt that the folder doesn't have.
        replaced: what the folder says to a prompt, and what the data say.
        removed: records whose prompt the data don't have.
        unchanged: records of the data that the folder has as they are.
        lost: of a folder without private records, the certificate's lines that the data don't have.
        cost_s: about how many seconds an update will take, by those of the last generation (of
            shards `diff` says it); None: not on record.
    """

    added: tuple[Record, ...] = ()
    replaced: tuple[tuple[Record, Record], ...] = ()
    removed: tuple[Record, ...] = ()
    unchanged: tuple[Record, ...] = ()
    lost: tuple[CertifiedRecord, ...] = ()
    cost_s: float | None = None

    @property
    def nothing(self) -> bool:
        """The data are the records that the folder was written with."""
        return not (self.added or self.replaced or self.removed or self.lost)

    @property
    def n_changed(self) -> int:
        """How many records are to be learnt or forgotten."""
        return len(self.added) + len(self.replaced) + len(self.removed) + len(self.lost)

    @property
    def is_much(self) -> bool:
        """So much of many records changes that all are trained anew."""
        n = len(self.added) + len(self.replaced) + len(self.unchanged)
        return n >= _MANY and self.n_changed > _MUCH * n

    @property
    def counts(self) -> dict[str, int]:
        """How many of each kind; `lost` only where there are any."""
        kinds = ("added", "replaced", "removed", "unchanged", *(("lost",) if self.lost else ()))
        return {kind: len(getattr(self, kind)) for kind in kinds}

    def to_json(self) -> dict[str, Any]:
        """Counts, and each record that changes, with its text."""
        return {
            "counts": self.counts,
            "nothing": self.nothing,
            "cost_s": self.cost_s,
            "added": [_line(record) for record in self.added],
            "replaced": [{**_line(new), "was": old.completion} for old, new in self.replaced],
            "removed": [_line(record) for record in self.removed],
            "lost": [{"id": line.id, "name": line.name} for line in self.lost],
        }


def _line(record: Record) -> dict[str, Any]:
    return {"id": record.id, "prompt": record.prompt, "completion": record.completion}


def finished_folder(out: Path) -> AdapterFolder:
    """The folder of a finished run.

    Raises:
        AdapterError, OutputError: it isn't one.
    """
    folder = AdapterFolder(out)
    if not folder.run or not (out / CERTIFICATE_FILE).is_file():
        raise OutputError(
            f"{out} holds no finished run of memlaw. Name a folder that 'memlaw write' finished."
        )
    return folder


def own_base(folder: AdapterFolder, config: WriteConfig, observer: Observer) -> BaseModel:
    """The folder's base model, loaded.

    Args:
        folder: a finished run's.
        config: its settings; of `model` that is used which is another than the run's.
        observer: is told of what isn't usual.

    Raises:
        AdapterError: it is another model than the adapter was trained on.
    """
    given = config.model != folder.setting("model", None)
    base = load_model(
        config.model if given else (folder.base_model or config.model),
        dtype=folder.run["dtype"],
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        spare_tokenizer=folder.path,
        notice=observer.notice,
    )
    if base.sha256 != folder.base_sha256:
        raise AdapterError(
            f"{folder.path} was written into another base model: its weights' hash is "
            f"{str(folder.base_sha256)[:12]}…, that of {base.spec} is {base.sha256[:12]}…. Name "
            "the right one with --model, or write anew with 'memlaw write'."
        )
    base = with_tokenizer(base, None, folder.path, lambda text: None)
    if folder.run.get("tokenizer_sha256", base.tokenizer_sha256) != base.tokenizer_sha256:
        raise AdapterError(
            f"{folder.path} was written with another tokenizer than {base.spec} has now. Give it "
            "its own again, or write anew with 'memlaw write'."
        )
    return base


def changes(folder: AdapterFolder, records: Sequence[Record], observer: Observer) -> Changes:
    """What is other in `records` than in a finished folder."""
    assert folder.path is not None
    known = read_private_records(folder.path)
    certificate = read_certificate(folder.path / CERTIFICATE_FILE)
    key = read_key(folder.path) if certificate.is_salted else None
    is_readable = key is not None or not certificate.is_salted

    def name(record: Record) -> str:
        return record.sha256 if key is None else commitment(key, record.sha256)

    lines = certificate.records
    if known is None and not is_readable:
        raise OutputError(
            f"{folder.path} has neither its private records nor the key to its certificate "
            f"({OPENINGS_FILE}), so what is in it can't be told. Fetch its {PRIVATE_FOLDER} folder "
            "again, or write anew with 'memlaw write'."
        )
    if known is not None and is_readable and {*map(name, known)} != {line.name for line in lines}:
        raise OutputError(
            f"{folder.path}: its private records are not those of its certificate. Remove "
            f"{PRIVATE_FOLDER}/{RECORDS_FILE}: the certificate then tells what has changed, "
            "as far as it can."
        )
    if known is None:
        observer.notice(
            f"{folder.path} has no private records, so only hashes are known. Records that the "
            "data still have can be told and held; whether a prompt is new or was replaced can't, "
            "and what the data don't have any more can't be forgotten but by --forget rewrite."
        )
        found = _by_name(lines, records, name)
    else:
        found = _by_prompt(known, records)
    changed = Changes(**found)
    if "shards" in folder.run:  # each has its own
        return changed
    return dataclasses.replace(changed, cost_s=cost_s(folder.run, changed, len(records)))


def _by_prompt(known: Sequence[Record], records: Sequence[Record]) -> dict[str, Any]:
    then = {_key(record.prompt): record for record in known}
    now = {_key(record.prompt) for record in records}
    found: dict[str, list[Any]] = {"added": [], "replaced": [], "unchanged": []}
    for record in records:
        old = then.get(_key(record.prompt))
        if old is None:
            found["added"].append(record)
        elif old.completion == record.completion:
            found["unchanged"].append(record)
        else:
            found["replaced"].append((old, record))
    found["removed"] = [record for key, record in then.items() if key not in now]
    _require_told_apart(found["removed"], found["added"])
    return {kind: tuple(records) for kind, records in found.items()}


def _require_told_apart(removed: Sequence[Record], added: Sequence[Record]) -> None:
    """Raise DataError where one prompt would be forgotten as text and learnt as a message."""
    then = {prompt_sha256(record.prompt): record for record in removed}
    both = [record for record in added if prompt_sha256(record.prompt) in then]
    if both:
        record = then[prompt_sha256(both[0].prompt)]
        forms = [
            "as text" if isinstance(r.prompt, str) else "in messages" for r in (record, both[0])
        ]
        raise DataError(
            f"{both[0].id}: {len(both)} prompt(s) are {forms[0]} in the folder and {forms[1]} in "
            "the data. The model sees the same: give them as they were written."
        )


def _by_name(
    lines: Sequence[CertifiedRecord], records: Sequence[Record], name: Callable[[Record], str]
) -> dict[str, Any]:
    then, now = {line.name for line in lines}, {name(record) for record in records}
    return {
        "added": tuple(record for record in records if name(record) not in then),
        "unchanged": tuple(record for record in records if name(record) in then),
        "lost": tuple(line for line in lines if line.name not in now),
    }


def _key(prompt: Prompt) -> str:
    whole = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    return json.dumps(whole, sort_keys=True)


def cost_s(run: Mapping[str, Any], found: Changes, n: int) -> float | None:
    """About how many seconds an update of one adapter takes.

    All that isn't training, as it took for each record; and training, for those that change, or for
    all of them, where they are trained anew (so they are where nobody knows what is to be
    forgotten). And looking for what is removed: at first about as long as an audit takes for as
    many records as there are answers to ask for. A try that is given up comes on top: nobody knows
    before.

    Args:
        run: what `run.json` says of the last generation.
        found: what changes.
        n: how many records there are then.

    Returns:
        None: it isn't on record what that took.
    """
    if found.nothing:
        return 0.0
    try:
        timings, n_then = run["timings"], int(run["records"]["n"])
        spent_s = sum(float(timings.get(name) or 0) for name in ("training_s", *_NOT_EACH_TIME))
        spent_s -= float(timings.get("trained_before_s") or 0)  # not in what a resumed run took
        rest_s = float(timings["wall_s"]) - spent_s
        rest_s *= max(n, _BATCH) / max(n_then, _BATCH)
        if found.removed:
            rest_s += len(found.removed) * _forgetting_s(run)
        all_anew = found.is_much or found.lost
        return rest_s + _training_s(run) * (n if all_anew else min(n, max(_STEP, found.n_changed)))
    except (LookupError, StopIteration, TypeError, ValueError, ZeroDivisionError):
        return None


def _forgetting_s(run: Mapping[str, Any]) -> float:
    """Seconds of looking for a record that is removed: as long as it took the last time, if any."""
    timings = run["timings"]
    if (took_s := timings.get("forgetting_s")) and (n := run["generations"][-1].get("removed")):
        return float(took_s) / int(n)
    n_at_once = max(int(run["records"]["n"]), _BATCH)
    return float(timings["audit_s"]) / n_at_once * (N_ATTEMPTS + N_SAMPLES)


def _training_s(run: Mapping[str, Any]) -> float:
    """Seconds of training a record when all were trained last."""
    spent = {**run["timings"], "records": run["records"]["n"]}
    if "generations" in run:
        spent = next(
            line
            for line in reversed(run["generations"])
            if line.get("anew") and line["training_s"] is not None  # a revert takes none
        )
    return float(spent["training_s"]) / int(spent["records"])
