"""What a certificate says that a new measurement doesn't bear out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from memlaw.certify.certificate import Certificate, CertifiedRecord, records_sha256
from memlaw.core.commitment import OPENINGS_FILE, commitment
from memlaw.core.criterion import MOST_FLIPS, of_thousand
from memlaw.measure.examine import Audit
from memlaw.measure.harm import KINDS, Harm
from memlaw.measure.specificity import specificity
from memlaw.measure.table import RecordVerdict

_MOST_NATS = 3.0  # of log-odds: more than rounding makes of the lowest of some tokens
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
    n_parameters: int | None = None,
) -> list[str]:
    """What a certificate says that a new measurement doesn't bear out.

    Args:
        certificate: the claim.
        audit: a new audit, at the certificate's threshold and margin, everything decoded.
        harms: by kind, those that could be measured again.
        base_sha256, tokenizer_sha256, adapter_sha256: of what was audited.
        invocation_ids, invocation_text: of the adapter that was audited; empty: always active.
        key: that of the records' commitments; None: it isn't here, see `unchecked`.
        n_parameters: of the adapter that was audited; None: there is none.

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
    if n_parameters is not None and n_parameters != certificate.n_parameters:
        found.append(
            f"the adapter has {n_parameters:,} trained numbers, not {certificate.n_parameters:,}"
        )
    ends = {example.target_ids[-1] for example in audit.examples} if audit.end else set()
    if certificate.end_token_id is not None and ends - {certificate.end_token_id}:
        found.append(
            f"answers end with token {', '.join(map(str, sorted(ends)))}, not "
            f"{certificate.end_token_id}"
        )
    claims = certificate.claims()
    for name, harm in harms.items():
        if name in claims and (said := harm.mismatch(KINDS[name].read(claims[name]))):
            found.append(said)
    verdict = specificity(harms, slack=True)
    if certificate.specific and verdict is not None:
        found += [f"certified as specific, but {reason}" for reason in verdict.reasons]
    found += _record_by_record(certificate, audit, key)
    if certificate.rounding is not None and (now := audit.flips_per_1000) is not None:
        then = float(certificate.rounding["flips_per_1000"])
        if now > _OFTENER * max(then, 1000 * MOST_FLIPS):
            found.append(
                f"of 1,000 answers {of_thousand(now)} are expected to be others in other batches, "
                f"not {of_thousand(then)}"
            )
    return found + contradictions(certificate)


def contradictions(certificate: Certificate) -> list[str]:
    """Where a certificate says two things that can't both be."""
    found = []
    n_certified = sum(r.certified for r in certificate.records)
    counts = (certificate.certified, certificate.n_records, certificate.n_certified)
    if counts != (n_certified == len(certificate.records), len(certificate.records), n_certified):
        found.append("the certificate contradicts itself: its totals are not those of its lines")
    if certificate.records_sha256 != records_sha256([r.name for r in certificate.records]):
        found.append("the certificate contradicts itself: its records' hash is not its lines'")
    return found


def unchecked(
    certificate: Certificate, harms: Mapping[str, Harm], key: bytes | None, device: str
) -> list[str]:
    """What can't be measured again here: a sentence for each thing.

    Args:
        certificate, harms, key: as for `mismatches`.
        device: the kind of device that was measured on.
    """
    found = [
        f"{KINDS[name].read(claim).row()[0]}: what the certificate measured it on isn't here"
        for name, claim in certificate.claims().items()
        if name not in harms
    ]
    if device != certificate.device:
        found.append(f"what it says of {certificate.device}: this was measured on {device}")
    verdict, beyond = specificity(harms), specificity(harms, slack=True)
    if certificate.specific and (verdict is None or beyond is None):
        found.append("that it is specific")
    elif certificate.specific and verdict and beyond and beyond.specific:
        found += [
            f"that it is specific: {reason}, by as little as rounding makes"
            for reason in verdict.reasons
        ]
    if certificate.is_salted and key is None:
        found.append(
            f"that these are the certified records: that takes {OPENINGS_FILE} beside the "
            "certificate, which isn't here; only their number was compared"
        )
    return found


def _log_odds(record: CertifiedRecord | RecordVerdict) -> float:
    """Of the lowest p, in nats; near 0 and 1, where next to nothing decides it, of 1e-6 from it."""
    p = min(max(record.min_p, 1e-6), 1 - 1e-6)
    return math.log(p / (1 - p))


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
        elif line.n_tokens != now_record.n_tokens:
            found.append(f"{line.id}: {now_record.n_tokens} tokens, not {line.n_tokens}")
        elif _log_odds(line) - _log_odds(now_record) > _MOST_NATS:
            found.append(f"{line.id}: its lowest p is {now_record.min_p:.3f}, not {line.min_p:.3f}")
    found += [
        f"{r.id}: not covered by the certificate"
        for name, r in now_by_name.items()
        if name not in then_by_name
    ]
    return found
