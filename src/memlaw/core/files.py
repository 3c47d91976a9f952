"""Files that are either whole or not there: written beside, flushed, and renamed into place."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlaw.core.errors import MemlawError, OutputError

if TYPE_CHECKING:
    import torch

# What lies in a finished folder; named here, where nothing heavy is imported.
CERTIFICATE_FILE = "certificate.json"
RUN_FILE = "run.json"
TOKENS_FILE = "tokens.parquet"
ANSWERS_FILE = "answers.json"

_OF_RUST = re.compile(r"\(os error (\d+)\)")


_LFS_POINTER = b"version https://git-lfs"


def lfs_pointer(path: Path, start: bytes) -> str:
    """What to say of a file that Git LFS hasn't fetched yet, by its first bytes; empty: it has."""
    if not start.startswith(_LFS_POINTER):
        return ""
    return (
        f"{path} is a pointer of Git LFS: the file itself hasn't been fetched. Fetch it "
        "('git lfs pull'), or download the file by itself."
    )


@contextmanager
def atomic_path(path: Path, *, private: bool = False) -> Iterator[Path]:
    """A path to write to; it becomes `path` when the `with` block ends without an error.

    A `private` file is for its owner's eyes alone, from its first byte on (mode 0600).

    Raises:
        OutputError: the folder can't be written to, or the disk is full.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise OutputError(f"{path.parent}: can't write there ({error.strerror}).") from error
    work = Path(name)
    try:
        with writing(path):
            yield work
            with work.open("rb") as file:
                os.fsync(file.fileno())
            os.chmod(work, 0o600 if private else 0o666 & ~umask())
            os.replace(work, path)
    finally:
        with contextlib.suppress(OSError):  # that it is there isn't worse than why
            work.unlink(missing_ok=True)


def umask() -> int:
    """The bits that new files and folders don't get."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the block what the system refuses is an OutputError that names `path`."""
    try:
        yield
    except Exception as error:
        if not (why := refused(error)):
            raise
        raise OutputError(f"{path}: can't be written ({why}).") from error


def refused(error: Exception) -> str:
    """What the system refused, in its words; empty where it is another error.

    What is written in Rust (safetensors, tokenizers) says so in its message alone.
    """
    if isinstance(error, OSError):
        return " ".join((error.strerror or str(error) or type(error).__name__).split())[:300]
    found = _OF_RUST.search(str(error))
    return os.strerror(int(found[1])) if found else ""


def made(folder: Path) -> list[Path]:
    """Make a folder and those that it lies in, as far as they aren't there; returns the new ones.

    Returns:
        The innermost first.

    Raises:
        OutputError: it can't be made, or is a file.
    """
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return absent


def require_usable(folder: Path) -> None:
    """See that a folder can be made and filled, before there is anything to fill it with.

    Nothing is left of the attempt.

    Raises:
        OutputError: it can't, or is a file.
    """
    nearest = folder
    try:
        nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        if nearest == folder.absolute() and not nearest.is_dir():
            raise OutputError(f"{folder} is a file. Name a folder that is new or empty.")
        if not os.access(nearest, os.W_OK):
            raise PermissionError
        # Rights alone don't tell: a file system may be read-only, full, or no place for files.
        tempfile.TemporaryDirectory(prefix=".memlaw-", dir=nearest).cleanup()
    except OSError as error:
        raise OutputError(
            f"{nearest}: no folder can be made or filled there. Choose another one."
        ) from error


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write UTF-8 text, atomically; see `atomic_path`."""
    with atomic_path(path, private=private) as work:
        work.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, content: Any, *, private: bool = False) -> None:
    """Write JSON, atomically; NaN and infinity are errors. See `atomic_path`."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text, private=private)


def read_json(path: Path, kind: type[MemlawError], mend: str) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Args:
        path: the file.
        kind: the error to raise.
        mend: what to do about a file that can't be read, as a sentence.

    Raises:
        MemlawError: of that kind: it can't be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise kind(f"{path} can't be read ({error}). {mend}") from error
    if not isinstance(content, dict):
        raise kind(f"{path} is not what it should be: no JSON object.")
    return content


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    private: bool = False,
) -> None:
    """Write tensors as safetensors, atomically; see `atomic_path`."""
    from safetensors.torch import save

    content = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    data = _in_order(save(content, metadata={"format": "pt", **(metadata or {})}))
    # `save_file` would write beside, too, under a name that nobody clears away after a kill.
    with atomic_path(path, private=private) as work:
        work.write_bytes(data)


def _in_order(data: bytes) -> bytes:
    """The same safetensors with its metadata in order: the same content, the same bytes."""
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[begin:]


def cache_folder() -> Path:
    """The folder for what is made once and used again.

    `$MEMLAW_CACHE`, or `memlaw` in the user's cache folder.
    """
    if chosen := os.environ.get("MEMLAW_CACHE"):
        return Path(chosen).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "memlaw"


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(content: Any) -> str:
    """Hash of a JSON-able value, independent of key order."""
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False).encode()
    ).hexdigest()
