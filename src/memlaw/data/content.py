"""What a file holds, unpacked, as bytes or as text."""

from __future__ import annotations

import json
from pathlib import Path

from memlaw.core.errors import DataError
from memlaw.core.files import lfs_pointer

# How packed files begin, what pyarrow calls the packing, and their suffix.
_PACKED = ((b"\x1f\x8b", "gzip", ".gz"), (b"\x28\xb5\x2f\xfd", "zstd", ".zst"))
# More than this isn't read at once, packed or not: a small file can unpack to whatever is wanted.
MOST_BYTES = 2**31
PACKED_SUFFIXES = tuple(suffix for _, _, suffix in _PACKED)


def suffix_of(path: Path) -> str:
    """The suffix that tells the format, in lower case: `.jsonl` of `a.jsonl.gz`, too."""
    plain = path.with_suffix("") if path.suffix.lower() in PACKED_SUFFIXES else path
    return plain.suffix.lower()


def bytes_of(path: Path) -> bytes:
    """The file's bytes; unpacked, if they are packed with gzip or zstd.

    Raises:
        DataError: it can't be read or unpacked, or is larger than `MOST_BYTES`.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}).") from error
    require_size(path, len(raw))
    if said := lfs_pointer(path, raw):
        raise DataError(said)
    for start, packing, _ in _PACKED:
        if raw.startswith(start):
            import pyarrow as pa

            try:
                with pa.CompressedInputStream(pa.BufferReader(raw), packing) as stream:
                    unpacked = stream.read(MOST_BYTES + 1)
                require_size(path, len(unpacked))
                return unpacked
            except (pa.ArrowException, OSError) as error:
                raise DataError(
                    f"{path}: can't be unpacked with {packing} ({error}). It may be cut short: "
                    "copy it again."
                ) from error
    return raw


def require_size(path: Path, n_bytes: int) -> None:
    """Raise DataError if that is more than is read at once."""
    if n_bytes > MOST_BYTES:
        raise DataError(
            f"{path} holds more than {MOST_BYTES / 2**30:g} GiB. Split it into several files."
        )


def text_of(path: Path) -> str:
    """The file's text: UTF-8, or UTF-16 or UTF-32 as its first bytes tell.

    Raises:
        DataError: it is in another encoding, or blank.
    """
    raw = bytes_of(path)
    encoding = json.detect_encoding(raw)
    try:
        text = raw.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: not {encoding.upper()} (byte 0x{raw[error.start]:02x}). Save the file "
            "as UTF-8."
        ) from error
    if not text.strip():
        raise DataError(f"{path} is empty. Give at least one record.")
    return text
