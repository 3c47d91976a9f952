"""Measure again what the certificate over a folder of shards says."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlaw.certify.certificate import Certificate, read_certificate
from memlaw.certify.check import CertificateCheck, check_certificate
from memlaw.certify.joined import joined_mismatches
from memlaw.core.commitment import commitment
from memlaw.core.errors import AdapterError
from memlaw.core.files import CERTIFICATE_FILE
from memlaw.core.observer import Observer
from memlaw.data.record import Record
from memlaw.measure.adapter_folder import AdapterFolder
from memlaw.settings.audit import AuditConfig
from memlaw.settings.given import settled
from memlaw.settings.update import UpdateConfig
from memlaw.settings.write import WriteConfig
from memlaw.shards.layout import index_key, read_index, shard_folder
from memlaw.writer.records import known_records


@dataclass(frozen=True, kw_only=True)
class ShardsCheck:
    """What became of the certificate over all when every shard was measured again.

    Attributes:
        certificate: the claim.
        checks: of each shard, by name; those that none of the records is in are left out.
        mismatches: a sentence for each thing that doesn't match, the shards' with their names.
    """

    certificate: Certificate
    checks: dict[str, CertificateCheck]
    mismatches: tuple[str, ...]

    @property
    def unchecked(self) -> tuple[str, ...]:
        """A sentence for each thing that can't be checked here, with the shard's name."""
        return tuple(
            f"{name}: {said}" for name, check in self.checks.items() for said in check.unchecked
        )

    @property
    def holds(self) -> bool:
        """Everything certified was found so again, and nothing else was given."""
        return not self.mismatches and not self.unchecked and self.certificate.certified

    @property
    def n_recalled(self) -> int:
        """Records that were recited."""
        return sum(check.audit.n_recalled for check in self.checks.values())


# How data are read: what `audit` leaves open is as it was when they were written.
_READ: dict[str, Any] = {
    **dict.fromkeys(("prompt_field", "completion_field", "delimiter", "recite_prompt")),
    "paraphrases": None,
    "data_format": "auto",
    "skip_bad": False,
}


def _reading(config: AuditConfig, folder: AdapterFolder) -> WriteConfig:
    """The settings that the records were written with, as far as no others are given."""
    how = UpdateConfig().over(folder.run)
    if config.paraphrases is None and how.paraphrases and not Path(how.paraphrases).is_file():
        how = dataclasses.replace(how, paraphrases=None)  # they were elsewhere
    given = {name: getattr(config, name) for name in _READ}
    meant = {name: value for name, value in given.items() if value != _READ[name]}
    return dataclasses.replace(how, **meant)


def check_shards(
    out: str | Path,
    data: Any,
    config: AuditConfig | None = None,
    *,
    certificate: str | Path | None = None,
    observer: Observer | None = None,
    **settings: Any,
) -> ShardsCheck:
    """Measure each shard's certificate again, and the one over all against them.

    Args:
        out: a folder of shards.
        data: the records that it is about.
        certificate: the one over all, if it isn't the folder's own.
        config, observer, **settings: as for `audit`.

    Raises:
        MemlawError: as for `check_certificate`; or index or key are missing.
    """
    out, observer = Path(out), observer or Observer()
    config = settled(AuditConfig, config, settings)
    whole = read_certificate(Path(certificate or out / CERTIFICATE_FILE))
    index, key = read_index(out), index_key(out)
    records = known_records(data, _reading(config, AdapterFolder(out)), observer)
    config = dataclasses.replace(config, **_READ)  # by each shard no more
    parts: dict[str, list[Record]] = {name: [] for name in index.adapters}
    found = []
    for record in records:
        if (name := index.adapter_of(record.prompt, key)) is None:
            found.append(f"{record.id}: not covered by the certificate")
        else:
            parts[name].append(record)
    certificates = {
        name: read_certificate(path)
        for name in parts
        if (path := shard_folder(out, name) / CERTIFICATE_FILE).is_file()
    }
    found += joined_mismatches(whole, certificates)
    known = {line.name for line in whole.records}
    if missing := known - {commitment(key, record.sha256) for record in records}:
        found.append(f"{len(missing)} record(s): certified, but not in these (changed or removed)")
    checks = {}
    for name, part in parts.items():
        if not part or name not in certificates:
            continue
        observer.notice(f"{name}: {len(part):,} record(s).")
        path = shard_folder(out, name) / CERTIFICATE_FILE
        checks[name] = check_certificate(path, part, config, phrasings_read=True, observer=observer)
        found += [f"{name}: {said}" for said in checks[name].mismatches]
    if not checks:
        raise AdapterError(f"none of these records is in {out}. Give the records that it recites.")
    return ShardsCheck(certificate=whole, checks=checks, mismatches=tuple(found))
