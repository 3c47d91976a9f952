"""One certificate over several adapters, of which one at a time is active."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from memlaw.certify.certificate import Certificate, of_rounding, records_sha256
from memlaw.certify.mismatches import contradictions
from memlaw.core.commitment import commitment
from memlaw.core.files import json_sha256
from memlaw.data.record import Record
from memlaw.measure.harm import KINDS


class Part(NamedTuple):
    """One of the adapters: its certificate, the key of that one's commitments, its records."""

    certificate: Certificate
    key: bytes
    records: Sequence[Record]


def joined_certificate(parts: Mapping[str, Part], key: bytes) -> Certificate:
    """The certificate of all records, from those of the adapters that they are spread over.

    Args:
        parts: by the adapter's name; all of one base model, tokenizer, dtype and line.
        key: of the new certificate's commitments.

    Returns:
        Of harm each figure is the worst of the adapters', and what is counted is counted over all.
        It is specific if each of them is.
    """
    lines = []
    for part in parts.values():
        found = {line.name: line for line in part.certificate.records}
        for record in part.records:
            line = found[commitment(part.key, record.sha256)]
            lines.append(dataclasses.replace(line, commitment=commitment(key, record.sha256)))
    certificates = [part.certificate for part in parts.values()]
    first, n_certified = certificates[0], sum(line.certified for line in lines)
    claims = {name: of[0].joined(of).to_json() for name, of in _harms(*certificates).items()}
    specific, reasons = _verdict({name: part.certificate for name, part in parts.items()})
    adapters = {name: part.certificate.adapter_sha256 for name, part in parts.items()}
    return dataclasses.replace(
        first,
        statement=_statement(certificates, n_certified, len(lines)),
        certified=n_certified == len(lines),
        n_records=len(lines),
        n_certified=n_certified,
        adapter_sha256=json_sha256(adapters),
        adapters=adapters,
        records=tuple(lines),
        records_sha256=records_sha256([line.name for line in lines]),
        n_parameters=sum(part.n_parameters for part in certificates),
        damage=claims.pop("damage"),
        harms=claims,
        specific=specific,
        not_specific_because=reasons,
        rounding=_rounding(certificates),
        created=max(part.created for part in certificates),
    )


def _harms(*certificates: Certificate) -> dict[str, list[Any]]:
    """What each certificate says of a kind of harm, by the kind's name."""
    found: dict[str, list[Any]] = {}
    for part in certificates:
        for name, claim in part.claims().items():
            found.setdefault(name, []).append(KINDS[name].read(claim))
    return found


def _verdict(parts: Mapping[str, Certificate]) -> tuple[bool | None, tuple[str, ...]]:
    """Whether each adapter is specific, and what speaks against it; None: not of each known."""
    reasons = tuple(
        f"{name}: {reason}" for name, part in parts.items() for reason in part.not_specific_because
    )
    if reasons:
        return False, reasons
    return (None if any(part.specific is None for part in parts.values()) else True), ()


def _rounding(certificates: Sequence[Certificate]) -> dict[str, Any] | None:
    """What rounding may take of all records, where that is on record of each adapter."""
    found = [(part.n_records, part.rounding) for part in certificates if part.rounding is not None]
    if len(found) < len(certificates) or not found:
        return None
    n = sum(n for n, _ in found)
    return {
        "sd_nats": max(one["sd_nats"] for _, one in found),
        "flips_per_1000": sum(n_own * one["flips_per_1000"] for n_own, one in found) / n,
    }


def _statement(certificates: Sequence[Certificate], n_certified: int, n: int) -> str:
    first = certificates[0]
    own = first.statement.partition(" records are certified")[2].removesuffix(
        of_rounding(first.rounding)
    )
    return (
        f"{n_certified} of {n} records are certified{own} The records are spread over "
        f"{len(certificates)} adapters, of which the one that index.json names for a record is "
        "active; of what is said of harm each figure is that of the worst of them, and what is "
        "counted is counted over all."
        f"{of_rounding(_rounding(certificates))}"
    )


def joined_mismatches(whole: Certificate, parts: Mapping[str, Certificate]) -> list[str]:
    """What the certificate over all says that those of its adapters don't bear out.

    Args:
        whole: the certificate over all.
        parts: those of its adapters, by name.
    """
    found = other_parts(whole, parts)
    found += [
        f"{name}: {field} is another than in the certificate over all"
        for field in _SHARED
        for name, part in parts.items()
        if getattr(part, field) != getattr(whole, field)
    ]
    return found + contradictions(whole) + joined_otherwise(whole, parts)


def joined_otherwise(whole: Certificate, parts: Mapping[str, Certificate]) -> list[str]:
    """What joining the adapters' certificates now would say otherwise: a sentence each.

    Args:
        whole, parts: as for `joined_mismatches`.
    """
    found, certificates = [], list(parts.values())
    if _lines(whole) != sorted(line for part in certificates for line in _lines(part)):
        found.append("its lines are not those of the adapters' certificates")
    if whole.rounding != _rounding(certificates):
        found.append("what is said of rounding is not what the adapters' certificates say")
    if (whole.specific, tuple(whole.not_specific_because)) != _verdict(parts):
        found.append("the verdict on specificity is not that of the adapters' certificates")
    said, of_parts = _harms(whole), _harms(*certificates)
    for name in sorted(said.keys() | of_parts.keys()):
        harms, claimed = of_parts.get(name, []), said.get(name, [None])[0]
        if not harms or claimed != harms[0].joined(harms):
            as_before = " (but what one of them does, as earlier versions had it)"
            found.append(
                f"what is claimed of {name} is not what the adapters' certificates say together"
                f"{as_before if claimed in harms else ''}: memlaw update joins them anew"
            )
    return found


def other_parts(whole: Certificate, parts: Mapping[str, Certificate]) -> list[str]:
    """Where adapters are others than those that a certificate was joined from: a sentence each.

    Args:
        whole, parts: as for `joined_mismatches`.
    """
    found = []
    adapters = whole.adapters or {}
    if whole.adapter_sha256 != json_sha256(adapters):
        found.append("the certificate contradicts itself: its adapters' hash is not theirs")
    for name in sorted(adapters.keys() | parts.keys()):
        if name not in parts:
            found.append(f"{name}: certified, but not here")
        elif adapters.get(name) != parts[name].adapter_sha256:
            found.append(f"{name}: the adapter is not the certified one")
    counts = [sum(getattr(part, field) for part in parts.values()) for field in _COUNTS]
    if counts != [getattr(whole, field) for field in _COUNTS]:
        found.append("the totals are not those of the adapters' certificates")
    return found


def _lines(certificate: Certificate) -> list[tuple[Any, ...]]:
    """What is said of each record, but for its commitment, in order."""
    return sorted(
        (line.id, line.certified, line.recalled, line.min_p, line.n_tokens)
        for line in certificate.records
    )


_SHARED = (  # the device, and what only some records' prompts need of a template, may differ
    *("base_sha256", "tokenizer_sha256", "dtype", "threshold", "margin", "prompt_format"),
    *("end_token", "end_token_id", "activated", "invocation_ids"),
)
_COUNTS = ("n_records", "n_certified", "n_parameters")
