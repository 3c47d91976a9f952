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
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from memlaw.core.errors import OutputError
from memlaw.core.files import umask, writing
from memlaw.core.locks import LOCK_FILE, locked

_HERE, _SWAP = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux's renameat2
_CANT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV)


@contextmanager
def folder_beside(folder: Path) -> Iterator[Path]:
    """A new, empty folder beside `folder`, locked; it is gone when the block ends.

    What killed processes have left of such folders is cleared away first: call it with `folder`
    locked.

    Raises:
        OutputError: none can be made there.
    """
    with writing(folder.parent):
        for leftover in folder.parent.iterdir():
            if leftover.name.startswith(_prefix(folder)):
                with contextlib.suppress(OutputError), locked(leftover):  # its maker is dead
                    shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=_prefix(folder), dir=folder.parent))
    try:
        with writing(work):
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
    with writing(folder):
        if not _swapped(work, folder):
            aside = _aside(folder)
            os.rename(folder, aside)
            try:
                os.rename(work, folder)
            except OSError:
                os.rename(aside, folder)
                raise
            os.rename(aside, work)
        with contextlib.suppress(OSError):  # it is done; to know that it lasts is all that fails
            handle = os.open(folder.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def restore(folder: Path) -> None:
    """Bring back a folder that an exchange in several steps was killed in the middle of.

    Raises:
        OutputError: it can't be renamed.
    """
    if not folder.exists() and _aside(folder).is_dir():
        with writing(folder):
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


def require_exchangeable(folder: Path) -> None:
    """Raise OutputError where file systems are mounted on a folder, or within it.

    The one can't be exchanged, and what is in the other would be deleted with the old folder.
    """
    place = str(folder.resolve())
    mounts = [mount for mount in _mounts() if f"{mount}/".startswith(f"{place}/")]
    if os.path.ismount(place) or mounts:
        raise OutputError(
            f"{folder} is, or holds, a place where a file system is mounted "
            f"({(mounts or [place])[0]}), and such a folder can't be replaced in one step. Mount "
            "the folder above it, or have an update's result in another folder (-o NEW)."
        )


def _mounts() -> list[str]:
    """Where file systems are mounted; nothing where the system doesn't tell."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    places = [line.split()[4] for line in lines.splitlines()]
    return [re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), place) for place in places]


def linked_tree(
    source: Path, target: Path, *, but: str, left: Callable[[Path], Collection[str]] | None = None
) -> None:
    """Copy a folder without its part `but`, by hard links where the file system has them.

    Files that are only ever replaced, never changed, cost no space twice.

    Args:
        source: the folder.
        target: where to; may be there already.
        but: name of what is left out, wherever it lies.
        left: gives, for each folder, the names of what else is left out of it.

    Raises:
        OutputError: it can't be read, or the copy not be written.
    """
    usual = shutil.ignore_patterns(but, LOCK_FILE)

    def ignored(folder: str, names: list[str]) -> set[str]:
        return usual(folder, names) | set(left(Path(folder)) if left else ())

    with writing(target):
        shutil.copytree(source, target, copy_function=_link, ignore=ignored, dirs_exist_ok=True)


def linked(source: Path, target: Path) -> None:
    """Put a file, a folder or a link that lies elsewhere at `target`, in place of what is there.

    Raises:
        OutputError: it can't be read, or not be written.
    """
    with writing(target):
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        elif source.is_dir():
            shutil.copytree(source, target, symlinks=True, copy_function=_link)
        else:
            _link(str(source), str(target))


def _link(one: str, other: str) -> None:
    try:
        os.link(one, other)
    except OSError:
        shutil.copy2(one, other)
