"""Signatures of folders, by the package `model-signing`, with keys in files."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path
from typing import Any

from memlaw.core.commitment import PRIVATE_FOLDER
from memlaw.core.errors import ConfigError, SignatureError
from memlaw.core.files import read_json
from memlaw.core.locks import LOCK_FILE

SIGNATURE_FILE = "model.sig"
# What isn't signed: its owner alone has it, and every update changes it.
_LEFT_OUT = (SIGNATURE_FILE, PRIVATE_FOLDER, "generations", LOCK_FILE)


def sign(folder: Path, key: Path) -> Path:
    """Sign every file of a folder but `private/`, `generations/` and git's; returns the signature.

    Of shards those of each shard aren't signed, either.

    Args:
        folder: an adapter's, or an export's.
        key: private key of an elliptic curve (P-256, P-384, P-521), PEM.

    Raises:
        ConfigError: `model-signing` isn't installed, or folder or key can't be used.
    """
    package = _package()
    _require(folder, key)
    whole = folder.resolve()  # paths that are left out are compared with whole ones
    try:
        signer = package.signing.Config().use_elliptic_key_signer(private_key=key)
        signer.set_hashing_config(_hashing(package, whole)).sign(whole, whole / SIGNATURE_FILE)
    except Exception as error:  # whatever is wrong with a key
        raise ConfigError(
            f"{folder} can't be signed with {key} ({type(error).__name__}: {error}). Give a "
            "private key as 'openssl ecparam -name prime256v1 -genkey -noout' makes it."
        ) from error
    return folder / SIGNATURE_FILE


def verify(folder: Path, key: Path) -> None:
    """Check a folder against the signature in it.

    Args:
        folder: that was signed.
        key: the public key that belongs to the signer's, PEM.

    Raises:
        ConfigError: `model-signing` isn't installed, or folder or key isn't there, or is no key.
        SignatureError: a file was changed, added or removed since, or it is another's signature.
    """
    package = _package()
    _require(folder, key)
    _require_public(key)
    if not (folder / SIGNATURE_FILE).is_file():
        raise SignatureError(f"{folder} has no {SIGNATURE_FILE}: it isn't signed.")
    whole = folder.resolve()  # paths that are left out are compared with whole ones
    try:
        verifier = package.verifying.Config().use_elliptic_key_verifier(public_key=key)
        verifier.set_hashing_config(_hashing(package, whole)).verify(whole, whole / SIGNATURE_FILE)
    except Exception as error:  # a mismatch, another key, a damaged signature
        raise SignatureError(_told(package, folder, key, error)) from error


def _told(package: Any, folder: Path, key: Path, error: Exception) -> str:
    """In words why a folder isn't what was signed, and what can be done."""
    from cryptography.exceptions import InvalidSignature

    signature, again = folder / SIGNATURE_FILE, "Fetch the folder again from whoever signed it"
    if str(error).startswith("Signature mismatch"):
        return (
            f"{folder} was changed after it was signed: {_changes(package, folder)}. {again}; or, "
            "if the change is yours, sign it again with memlaw sign."
        )
    if str(error).startswith("Key mismatch"):
        return (
            f"{folder} was signed with another key: {key} isn't the public key of its signer. "
            "Name the signer's; or don't trust the folder."
        )
    if isinstance(error, InvalidSignature):
        return f"{signature} was changed itself, or made with another key than {key}. {again}."
    return f"{signature} can't be read as a signature ({type(error).__name__}: {error}). {again}."


def _changes(package: Any, folder: Path) -> str:
    """Which files differ from what the signature, which is known to be good, says of them."""
    envelope = read_json(folder / SIGNATURE_FILE, SignatureError, "Fetch it again.")["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    signed = {file["name"]: file["digest"] for file in statement["predicate"]["resources"]}
    whole = folder.resolve()
    manifest = _hashing(package, whole).hash(whole)
    here = {file.identifier: file.digest.digest_hex for file in manifest.resource_descriptors()}
    told = [
        f"{name} {'has other content' if name in here else 'is gone'}"
        for name in sorted(signed)
        if here.get(name) != signed[name]
    ]
    return ", ".join([*told, *(f"{name} was added" for name in sorted(here.keys() - signed))])


def _hashing(package: Any, folder: Path) -> Any:
    parts = [folder, *folder.glob("shards/*")]
    left_out = [part / name for part in parts for name in _LEFT_OUT]
    return package.hashing.Config().set_ignored_paths(paths=left_out, ignore_git_paths=True)


def _require(folder: Path, key: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder. Name the folder that holds the adapter.")
    if not key.is_file():
        raise ConfigError(f"{key} is not a file. Name the file that holds the key.")


def _require_public(key: Path) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        load_pem_public_key(key.read_bytes())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{key} holds no public key. Give the one that 'openssl ec -in KEY -pubout' makes of "
            "the signer's private key."
        ) from error


def _package() -> Any:
    if importlib.util.find_spec("model_signing") is None:
        raise ConfigError("model-signing is not installed. Run pip install '.[sign]'.")
    import model_signing

    return model_signing
