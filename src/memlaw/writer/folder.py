"""The folder a run writes: what lies in it, when it may be taken, and the checkpoint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlaw.core.commitment import PRIVATE_FOLDER
from memlaw.core.errors import ConfigError, OutputError
from memlaw.core.files import (
    ANSWERS_FILE,
    CERTIFICATE_FILE,
    RUN_FILE,
    TOKENS_FILE,
    made,
    read_json,
    require_usable,
    write_tensors,
    writing,
)
from memlaw.core.folders import linked
from memlaw.core.locks import LOCK_FILE, locked
from memlaw.export.signing import SIGNATURE_FILE
from memlaw.model.formats import ADAPTER_FILES
from memlaw.model.tokenizer import TOKENIZER_FILES
from memlaw.train.snapshots import SNAPSHOTS_FILE

if TYPE_CHECKING:
    import torch

CHECKPOINT_FILE = "checkpoint.safetensors"
CARD_FILE = "README.md"
SHARDS_FOLDER = "shards"
GENERATIONS = "generations"  # a folder: what the folder was before its updates; see `history`
IGNORE_FILE = ".gitignore"
SKIPPED_FILE = "skipped_rows.jsonl"
INDEX_FILE = "index.json"  # of shards
SHARD_NAME = re.compile(r"\w[\w.-]*")  # no path
_FILES = (
    CHECKPOINT_FILE,
    RUN_FILE,
    TOKENS_FILE,
    ANSWERS_FILE,
    SNAPSHOTS_FILE,
    CARD_FILE,
    SKIPPED_FILE,
    CERTIFICATE_FILE,
    PRIVATE_FOLDER,
    GENERATIONS,
    IGNORE_FILE,
    *TOKENIZER_FILES,
    *ADAPTER_FILES,
)


# What memlaw has in a finished folder; all else is somebody's own.
_OWN = frozenset((*_FILES, SIGNATURE_FILE, LOCK_FILE))


def others_files(out: Path) -> list[str]:
    """What lies in a finished folder and isn't memlaw's, git's folder for one.

    Returns:
        Paths within it, of files and folders, in order; of shards what lies in those, and beside.
    """
    shards = _shard_names(out)
    own = {".": _OWN}
    if shards:
        own = {".": _OWN | {SHARDS_FOLDER, INDEX_FILE}, SHARDS_FOLDER: frozenset(shards)}
        own |= dict.fromkeys((f"{SHARDS_FOLDER}/{name}" for name in shards), _OWN)
    with writing(out):
        return sorted(
            p.relative_to(out).as_posix()
            for folder, names in own.items()
            if (out / folder).is_dir()
            for p in (out / folder).iterdir()
            if p.name not in names and not _is_leftover(p)
        )


def carry_over(then: Path, now: Path) -> None:
    """Take what isn't memlaw's from a folder, and its shards, into the one that takes its place.

    So what somebody has changed in `.gitignore`, and a tokenizer that was put there.
    """
    parts = [".", *(f"{SHARDS_FOLDER}/{name}" for name in _shard_names(then))]
    put_there = [
        f"{part}/{name}"
        for part in parts
        if (now / part).is_dir()
        for name in (IGNORE_FILE, *TOKENIZER_FILES)
        if name == IGNORE_FILE or not (now / part / name).exists()
    ]
    for path in (*others_files(then), *put_there):
        if os.path.lexists(then / path):
            made((now / path).parent)  # a shard that was dropped
            linked(then / path, now / path)


def _shard_names(out: Path) -> list[str]:
    """The names of a folder's shards; of one adapter's there are none."""
    if not (out / RUN_FILE).is_file():
        return []
    shards = read_json(out / RUN_FILE, OutputError, "Fetch it again.").get("shards")
    names = shards.get("names") if isinstance(shards, dict) else None
    names = names if isinstance(names, list) else []
    return [name for name in names if isinstance(name, str) and SHARD_NAME.fullmatch(name)]


def whole_of(out: Path) -> Path | None:
    """The folder of shards that a folder is a shard of; None: it isn't one."""
    place = out.resolve()
    whole = place.parent.parent
    if place.parent.name != SHARDS_FOLDER or not (whole / RUN_FILE).is_file():
        return None
    return whole if place.name in _shard_names(whole) else None


def require_no_part(out: Path) -> None:
    """Raise OutputError where a folder is a part of another: a shard, or an earlier generation."""
    place = out.resolve()
    if place.parent.name == GENERATIONS and (place.parent.parent / RUN_FILE).is_file():
        raise OutputError(
            f"{out} is an earlier generation of {place.parent.parent}, and stays what it was. "
            f"'memlaw revert {place.parent.parent} --to {place.name}' goes back to it; or make "
            "another folder of it (-o NEW)."
        )
    if (whole := whole_of(out)) is not None:
        raise OutputError(
            f"{out} is a shard of {whole}, whose index and certificate are of it as it is. Change "
            f"{whole} itself, with all its records; or make another folder of the shard (-o NEW)."
        )


@contextmanager
def taken(out: Path, *, resume: bool) -> Iterator[None]:
    """Within the block a folder is this process's to write a run into; made if it isn't there.

    Raises:
        OutputError: as of `check_out`; or another process is writing it.
    """
    leftovers(out, resume=resume)  # refused before anything is made
    with locked(out, make=True):
        check_out(out, resume=resume)
        yield


def check_out(out: Path, *, resume: bool) -> None:
    """Refuse a folder that holds anything but an interrupted run that is to be resumed.

    Files that a killed run was still writing are removed; nothing else is touched.

    Raises:
        OutputError: says what the folder holds, or why it can't be made.
    """
    with writing(out):
        for leftover in leftovers(out, resume=resume):
            leftover.unlink(missing_ok=True)


def leftovers(out: Path, *, resume: bool) -> list[Path]:
    """What a killed run was still writing in a folder that may be taken.

    Raises:
        OutputError: as of `check_out`.
    """
    require_usable(out)
    if not out.is_dir():
        return []
    with writing(out):
        lying = [p for p in out.iterdir() if p.name != LOCK_FILE]
        found = [p for p in lying if _is_leftover(p)]
        present = {p.name for p in lying if p not in found and not _is_bare(p)}
    if foreign := sorted(present - set(_FILES)):
        raise OutputError(
            f"{out} already holds something else ({', '.join(foreign[:3])}). Name a folder that "
            "is new or empty."
        )
    finished = CERTIFICATE_FILE in present and CHECKPOINT_FILE not in present
    if present and not finished and CHECKPOINT_FILE not in present:
        raise OutputError(
            f"{out} already holds something else ({', '.join(sorted(present)[:3])}), and no "
            "checkpoint to go on from. Name a folder that is new or empty."
        )
    if resume and finished:
        raise OutputError(
            f"{out} holds a finished run: there is nothing to go on with. Check it with "
            f"'memlaw audit DATA --certificate {out / CERTIFICATE_FILE}'."
        )
    if present and not resume:
        what = "a finished run" if finished else "an unfinished run"
        mend = "" if finished else "go on with it by --resume, or "
        raise OutputError(f"{out} already holds {what}: {mend}name another folder.")
    return found


def _is_bare(path: Path) -> bool:
    """The private folder of a run that was killed before anything was in it."""
    return path.name == PRIVATE_FOLDER and all(p.name.startswith(".") for p in path.iterdir())


def _is_leftover(path: Path) -> bool:
    """A file that a killed process was still writing."""
    return any(path.name.startswith(f".{name}.") for name in _FILES)


def write_checkpoint(
    out: Path, tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any]
) -> None:
    """Write a checkpoint, one file, atomically; makes the folder if need be."""
    made(out)
    write_tensors(out / CHECKPOINT_FILE, tensors, {"memlaw": json.dumps(content)})


def read_checkpoint(
    out: Path, identity: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Read the checkpoint in `out`, if there is one.

    Args:
        out: the folder.
        identity: all that decides which weights come out; must be what the run began with.
        defaults: what a setting is that a checkpoint doesn't name: one that is younger than it.

    Raises:
        OutputError: it is damaged.
        ConfigError: it was begun with other settings, records or base model. Names them.
    """
    from safetensors import safe_open

    path = out / CHECKPOINT_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads(file.metadata()["memlaw"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        then = content["identity"]
    except Exception as error:
        raise OutputError(f"{path} is damaged ({error}). Remove it and start anew.") from error
    if changed := sorted(
        k
        for k in then.keys() | identity.keys()
        if then.get(k, defaults.get(k)) != identity.get(k, defaults.get(k))
    ):
        raise ConfigError(
            f"{out} was begun with another {', another '.join(changed)}. Resume with the same "
            "settings and records, or name another folder."
        )
    return tensors, content


def checkpoint_clock(out: Path) -> str | None:
    """The time that a checkpoint's chat template was told, ISO 8601; None: not on record."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(out / CHECKPOINT_FILE, framework="pt") as file:
            found = json.loads(file.metadata()["memlaw"]).get("clock")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return None  # `read_checkpoint` says what is wrong
    return found if isinstance(found, str) else None
