"""Names for records that tell nothing of them to who hasn't the key: salted commitments.

A record's commitment is SHA-256(salt ‖ hash of the record), its salt HMAC-SHA-256(key, hash of the
record). The key lies in a private file beside the certificate. With it each record's commitment can
be computed again; without it a guess of the record can't be tried. Who is shown one salt can check
one record, and learns nothing of the others.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from memlaw.core.errors import CertificateError
from memlaw.core.files import read_json, write_json, writing

PRIVATE_FOLDER = "private"  # in a run's folder: never to be published
OPENINGS_FILE = f"{PRIVATE_FOLDER}/openings.json"
_KEY_BYTES = 32


def salt(key: bytes, record_sha256: str) -> bytes:
    """The salt of one record: what opens its commitment to somebody else."""
    return hmac.digest(key, record_sha256.encode(), "sha256")


def commitment(key: bytes, record_sha256: str) -> str:
    """The name of a record in a certificate that may be published; hexadecimal."""
    return hashlib.sha256(salt(key, record_sha256) + record_sha256.encode()).hexdigest()


def read_key(folder: Path) -> bytes | None:
    """The key in a folder's private file; None: the file isn't here.

    Raises:
        CertificateError: it can't be read, or holds no key.
    """
    path = folder / OPENINGS_FILE
    if not path.exists():
        return None
    content = read_json(path, CertificateError, "Fetch it again, or move it away.")
    try:
        key = bytes.fromhex(content["key"])
        if len(key) != _KEY_BYTES:
            raise ValueError(f"{len(key)} bytes")
    except (KeyError, TypeError, ValueError) as error:
        raise CertificateError(
            f"{path} holds no key ({type(error).__name__}: {error}). Fetch it again, or move it "
            "away."
        ) from error
    return key


def private_folder(folder: Path) -> Path:
    """The folder in `folder` that its owner alone can look into; made where it isn't there.

    Raises:
        OutputError: it can't be made.
    """
    private = folder / PRIVATE_FOLDER
    with writing(private):
        private.mkdir(mode=0o700, exist_ok=True)
        if os.name == "posix":
            private.chmod(0o700)
    return private


def kept_key(folder: Path) -> bytes:
    """The folder's key; made, and written for its owner alone, where there is none yet.

    Raises:
        CertificateError: the file that is there holds no key.
        OutputError: it can't be written.
    """
    key = read_key(folder)
    if key is not None:
        return key
    key = secrets.token_bytes(_KEY_BYTES)
    private_folder(folder)
    content = {
        "format": 1,
        "about": "Opens the commitments in ../certificate.json. Keep it to those who may check "
        "guesses of the records.",
        "key": key.hex(),
    }
    write_json(folder / OPENINGS_FILE, content, private=True)
    return key
