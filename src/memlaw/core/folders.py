"""Whole folders that are exchanged in one step, by one process at a time.

What is new is made in a folder beside, and takes the old one's place by a single rename, so whoever
is killed leaves the old folder or the new one. A leftover is always rubbish: the next one to come
clears it away.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memlaw.core.errors import OutputError
from memlaw.core.files import umask

_HERE, _SWAP = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux's renameat2
_CANT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block, no other process is in such a block for this folder.

    The lock is the folder's own: it goes when the process does, however it ends.

    Raises:
        OutputError: another process is.
    """
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(handle), os.stat(folder)):
                raise BlockingIOError  # it was exchanged between the two
        except BlockingIOError as error:
            raise OutputError(
                f"{folder} is being updated by another process. Wait until that has ended."
            ) from error
        yield
    finally:
        os.close(handle)


@contextmanager
def folder_beside(folder: Path) -> Iterator[Path]:
    """A new, empty folder beside `folder`, locked; it is gone when the block ends.

    What killed processes have left of such folders is cleared away first: call it with `folder`
    locked.

    Raises:
        OutputError: none can be made there.
    """
    for leftover in folder.parent.iterdir():
        if leftover.name.startswith(_prefix(folder)):
            with contextlib.suppress(OutputError, OSError), locked(leftover):  # its maker is dead
                shutil.rmtree(leftover, ignore_errors=True)
    try:
        work = Path(tempfile.mkdtemp(prefix=_prefix(folder), dir=folder.parent))
    except OSError as error:
        raise OutputError(f"{folder.parent}: can't write there ({error.strerror}).") from error
    try:
        work.chmod(folder.stat().st_mode & 0o7777 if folder.exists() else 0o777 & ~umask())
        with locked(work):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _prefix(folder: Path) -> str:
    return f".{folder.name}.next-"


def exchange(work: Path, folder: Path) -> None:
    """Give `folder` the content of `work`, and `work` that of `folder`, in one step.

    Where the system can't (it isn't Linux, or some network file systems), in three renames: killed
    between the first two, `folder` is missing until `restore` brings the old one back.

    Raises:
        OutputError: they can't be renamed.
    """
    try:
        if not _swapped(work, folder):
            aside = _aside(folder)
            os.rename(folder, aside)
            os.rename(work, folder)
            os.rename(aside, work)
        handle = os.open(folder.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise OutputError(f"{folder}: can't be replaced ({error.strerror}).") from error


def restore(folder: Path) -> None:
    """Bring back a folder that an exchange in several steps was killed in the middle of."""
    if not folder.exists() and _aside(folder).is_dir():
        os.rename(_aside(folder), folder)


def _aside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.last"


def _swapped(one: Path, other: Path) -> bool:
    """Whether the two were exchanged in one step."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _SWAP) == 0:
        return True
    if (code := ctypes.get_errno()) in _CANT:
        return False
    raise OSError(code, os.strerror(code))


def linked_tree(source: Path, target: Path, *, but: str) -> None:
    """Copy a folder without its part `but`, by hard links where the file system has them.

    Files that are only ever replaced, never changed, cost no space twice.
    """

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    ignored = shutil.ignore_patterns(but)
    shutil.copytree(source, target, copy_function=link, ignore=ignored, dirs_exist_ok=True)
