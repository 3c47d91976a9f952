"""What a certificate says that a new measurement doesn't bear out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memlaw.certify.certificate import Certificate, records_sha256
from memlaw.core.commitment import OPENINGS_FILE, commitment
from memlaw.core.criterion import MOST_FLIPS, of_thousand
from memlaw.measure.examine import Audit
from memlaw.measure.harm import KINDS, Harm

_OFTENER = 10  # times: a forecast from other roundings may differ by some


def mismatches(
    certificate: Certificate,
    audit: Audit,
    harms: Mapping[str, Harm],
    *,
    base_sha256: str,
    tokenizer_sha256: str,
    adapter_sha256: str,
    invocation_ids: Sequence[int] = (),
    invocation_text: str = "",
    key: bytes | None = None,
) -> list[str]:
    """What a certificate says that a new measurement doesn't bear out.

    Args:
        certificate: the claim.
        audit: a new audit, at the certificate's threshold and margin, everything decoded.
        harms: by kind, those that could be measured again.
        base_sha256, tokenizer_sha256, adapter_sha256: of what was audited.
        invocation_ids, invocation_text: of the adapter that was audited; empty: always active.
        key: that of the records' commitments; None: it isn't here, see `unchecked`.

    Returns:
        A sentence for each thing that doesn't match; empty if the certificate holds.
    """
    found = [
        f"{what} is not the certified one: its hash is {now[:12]}…, not {then[:12]}…"
        for what, now, then in (
            ("the base model", base_sha256, certificate.base_sha256),
            ("the tokenizer", tokenizer_sha256, certificate.tokenizer_sha256),
            ("the adapter", adapter_sha256, certificate.adapter_sha256),
        )
        if now != then
    ]
    certified_ids = certificate.invocation_ids or ()
    if certified_ids != tuple(invocation_ids):
        found.append(
            "the adapter is not active where the certified one is: its invocation tokens are "
            f"{list(invocation_ids)}, not {list(certified_ids)}"
        )
    elif invocation_text not in (certificate.activated or ""):
        found.append(
            f"the adapter is active from {invocation_text!r} on, not from {certificate.activated!r}"
        )
    if audit.dtype != certificate.dtype:
        found.append(f"measured in {audit.dtype}, but certified for {certificate.dtype}")
    claims = certificate.claims()
    for name, harm in harms.items():
        if name in claims and (said := harm.mismatch(KINDS[name].read(claims[name]))):
            found.append(said)
    found += _record_by_record(certificate, audit, key)
    if certificate.rounding is not None and (now := audit.flips_per_1000) is not None:
        then = float(certificate.rounding["flips_per_1000"])
        if now > _OFTENER * max(then, 1000 * MOST_FLIPS):
            found.append(
                f"of 1,000 answers {of_thousand(now)} are expected to be others in other batches, "
                f"not {of_thousand(then)}"
            )
    n_certified = sum(r.certified for r in certificate.records)
    counts = (certificate.certified, certificate.n_records, certificate.n_certified)
    if counts != (n_certified == len(certificate.records), len(certificate.records), n_certified):
        found.append("the certificate contradicts itself: its totals are not those of its lines")
    if certificate.records_sha256 != records_sha256([r.name for r in certificate.records]):
        found.append("the certificate contradicts itself: its records' hash is not its lines'")
    return found


def unchecked(certificate: Certificate, key: bytes | None) -> list[str]:
    """What can't be measured again here: a sentence for each thing."""
    if not certificate.is_salted or key is not None:
        return []
    return [
        f"that these are the certified records: that takes {OPENINGS_FILE} beside the certificate, "
        "which isn't here; only their number was compared"
    ]


def _record_by_record(certificate: Certificate, audit: Audit, key: bytes | None) -> list[str]:
    """What certified records are now; without the key of their commitments, how many."""
    found = []
    if certificate.is_salted and key is None:
        then = (certificate.n_records, certificate.n_certified)
        now = (len(audit.records), audit.n_certified)
        if now != then:
            found.append(
                f"{now[1]} of {now[0]} record(s) are certified now, not {then[1]} of {then[0]}"
            )
        return found
    now_by_name = {
        r.sha256 if key is None or not certificate.is_salted else commitment(key, r.sha256): r
        for r in audit.records
    }
    then_by_name = {r.name: r for r in certificate.records}
    if certificate.is_salted and not now_by_name.keys() & then_by_name.keys():
        return [
            "none of these records is certified; or the key in "
            f"{OPENINGS_FILE} is another certificate's"
        ]
    for name, line in then_by_name.items():
        now_record = now_by_name.get(name)
        if now_record is None:
            found.append(f"{line.id}: certified, but not in these records (changed or removed)")
        elif line.certified and not now_record.certified:
            found.append(
                f"{now_record.id}: certified, but now its lowest p is {now_record.min_p:.3f}"
                f" and decoding {'agrees' if now_record.decoded_recalled else 'differs'}"
            )
        elif line.recalled and not now_record.recalled:
            found.append(f"{now_record.id}: recited when certified, but not now")
    found += [
        f"{r.id}: not covered by the certificate"
        for name, r in now_by_name.items()
        if name not in then_by_name
    ]
    return found
