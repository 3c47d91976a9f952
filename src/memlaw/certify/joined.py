"""One certificate over several adapters, of which one at a time is active."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from memlaw.certify.certificate import Certificate, of_rounding, records_sha256
from memlaw.core.commitment import commitment
from memlaw.core.files import json_sha256
from memlaw.data.record import Record
from memlaw.measure.harm import KINDS
from memlaw.measure.specificity import specificity


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
        What is claimed of a kind of harm is what the worst adapter does.
    """
    lines = []
    for part in parts.values():
        found = {line.name: line for line in part.certificate.records}
        for record in part.records:
            line = found[commitment(part.key, record.sha256)]
            lines.append(dataclasses.replace(line, commitment=commitment(key, record.sha256)))
    certificates = [part.certificate for part in parts.values()]
    first, n_certified = certificates[0], sum(line.certified for line in lines)
    claims = _worst(certificates)
    verdict = specificity({name: KINDS[name].read(claim) for name, claim in claims.items()})
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
        specific=verdict.specific if verdict else None,
        not_specific_because=verdict.reasons if verdict else (),
        rounding=_rounding(certificates),
        created=max(part.created for part in certificates),
    )


def _worst(certificates: Sequence[Certificate]) -> dict[str, dict[str, Any]]:
    """Of each kind of harm the claim whose 95 % interval reaches highest."""
    names = {name: None for part in certificates for name in part.claims()}
    return {
        name: max(
            (part.claims()[name] for part in certificates if name in part.claims()),
            key=lambda claim: KINDS[name].read(claim).high,
        )
        for name in names
    }


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
        "active; what is said of harm is what the worst of them does."
        f"{of_rounding(_rounding(certificates))}"
    )


def joined_mismatches(whole: Certificate, parts: Mapping[str, Certificate]) -> list[str]:
    """What the certificate over all says that those of its adapters don't bear out.

    Args:
        whole: the certificate over all.
        parts: those of its adapters, by name.
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
    claims = _worst(list(parts.values())) if parts else {}
    if whole.rounding != _rounding(list(parts.values())):
        found.append("what is said of rounding is not what the adapters' certificates say")
    found += [
        f"what is claimed of {name} is not what the worst adapter does"
        for name in sorted(claims.keys() | whole.claims().keys())
        if claims.get(name) != whole.claims().get(name)
    ]
    return found


_COUNTS = ("n_records", "n_certified", "n_parameters")
