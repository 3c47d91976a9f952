"""One process at a time in a folder: a lock that ends with its process, and says whose it is."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memlaw.core.errors import OutputError
from memlaw.core.files import made, writing

LOCK_FILE = ".lock"  # who is in the folder; left by a killed process it means nothing
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # of some file systems
_MOST_BYTES = 1000


@contextmanager
def locked(folder: Path, *, make: bool = False) -> Iterator[None]:
    """Within the block, no other process is in such a block for this folder.

    The lock is the folder's own: it goes when the process does, however it ends, and no clock is
    asked. A file in it says, to who is refused, which process it is. Where the system has no such
    locks (some network file systems) nobody is kept out.

    Args:
        folder: to be locked.
        make: make it if it isn't there; if it is empty in the end, what was made is removed again.

    Raises:
        OutputError: another process is in it, or it can't be opened or made.
    """
    new = made(folder) if make else []
    try:
        with _only_one(folder) as handle:
            _say_who(handle)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(LOCK_FILE, dir_fd=handle)
    finally:
        for path in new:
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()


def empty(folder: Path) -> None:
    """Remove what lies in a folder that this process has locked.

    Raises:
        OutputError: it can't be removed.
    """
    with writing(folder):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()


@contextmanager
def _only_one(folder: Path) -> Iterator[int]:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"{folder} can't be opened ({error.strerror}).") from error
    try:
        try:
            _lock(handle)
            if not os.path.samestat(os.fstat(handle), os.stat(folder)):
                raise BlockingIOError  # it was exchanged between the two
        except (BlockingIOError, FileNotFoundError) as error:
            raise OutputError(
                f"{folder} is being written by another process{_who(handle)}. Wait until that has "
                "ended."
            ) from error
        yield handle
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise OutputError(f"no lock can be had ({error.strerror}).") from error


def _say_who(handle: int) -> None:
    """Leave a note of who has the lock. It holds without one, too."""
    note = json.dumps({"host": socket.gethostname(), "process": os.getpid()})
    with contextlib.suppress(OSError):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        file = os.open(LOCK_FILE, flags, 0o644, dir_fd=handle)
        try:
            os.write(file, note.encode())
        finally:
            os.close(file)


def _who(handle: int) -> str:
    """Who has the lock, as ` (process 17 on host h)`; empty where nobody says."""
    try:
        file = os.open(LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=handle)
        try:
            note = json.loads(os.read(file, _MOST_BYTES))
        finally:
            os.close(file)
        return f" (process {int(note['process'])} on host {note['host']!s:.80})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
