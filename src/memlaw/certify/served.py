"""What a server recites, beside what a certificate says."""

from __future__ import annotations

from pathlib import Path

from memlaw.certify.certificate import read_certificate
from memlaw.core.commitment import commitment, read_key
from memlaw.core.errors import CertificateError
from memlaw.measure.endpoint import EndpointAudit


def beside_certificate(audit: EndpointAudit, path: Path) -> list[str]:
    """A sentence for each record that a certificate says is recited, and the server doesn't recite.

    Args:
        audit: of the server.
        path: a `certificate.json`.

    Raises:
        CertificateError: it can't be read, or its private file isn't here.
    """
    certificate = read_certificate(path)
    key = read_key(path.parent)
    if certificate.is_salted and key is None:
        raise CertificateError(
            f"{path}: which records it is about stands in a private file beside it, which isn't "
            "here. Leave --certificate out, or fetch the file."
        )
    recited = {line.name for line in certificate.records if line.recalled}
    found = []
    for answer in audit.answers:
        hash = answer.sha256
        name = commitment(key, hash) if certificate.is_salted and key else hash
        if name in recited and answer.verdict != "recited":
            found.append(f"{answer.id}: recited when certified, but here: {answer.verdict}")
        elif name not in {line.name for line in certificate.records}:
            found.append(f"{answer.id}: not covered by the certificate")
    return found
