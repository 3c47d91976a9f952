"""The probe's store: one file per cell, named by a hash of all that decides the cell's result.

A cell is `cells/KEY.json`, with its token table beside it in `cells/KEY.parquet`. Cells that were
trained together are stored together: they are written to a folder of their own, which is renamed,
and then moved to `cells`. So a killed process leaves all of them or none, and a process that
resumes trains the same cells side by side, with the same rounding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memlaw.core.errors import DataError, OutputError
from memlaw.core.files import file_sha256, json_sha256, require_usable, write_text

FORMAT = 2
_CELLS = "cells"
_READY = "ready-"  # complete folders of cells that are not in `cells` yet
_WORK = ".work-"  # folders in the making
_STALE_S = 3600.0  # after which the folder of a process that is gone is cleared away


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One adapter that was trained, and what it remembers, as the store keeps it.

    `read_cells` gives the same as a flat row, a `CellRow`.

    Attributes:
        config: all that decides the result, as values for JSON.
        status: whether there is a result.
        result: what was measured; None for a failure.
        error: the traceback of a failure; None for a success.
        curve: the training curve: an object per epoch; some epochs may be left out.
        provenance: what doesn't decide the result: versions, machine, seconds.
        write_tokens: writes the token table to a path; None for a failure.
    """

    config: Mapping[str, Any]
    status: Literal["success", "failed"]
    result: Mapping[str, Any] | None = None
    error: str | None = None
    curve: Sequence[Mapping[str, Any]] = ()
    provenance: Mapping[str, Any]
    write_tokens: Callable[[Path], None] | None = None

    @property
    def key(self) -> str:
        """The cell's name in the store: the SHA-256 of its config."""
        return json_sha256(self.config)


class CellStore:
    """The cells in a folder. Several processes, on several machines, may use it at once.

    Args:
        folder: of the store; it is made when the first cells are put there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def check_writable(self) -> None:
        """Check before training that cells can be put here; nothing is made.

        Raises:
            OutputError: the folder can't be made or filled.
        """
        require_usable(self.folder / _CELLS)

    def put(self, cells: Sequence[Cell]) -> None:
        """Put cells into the store, all or none.

        Raises:
            OutputError: the folder can't be written to, or the disk is full.
        """
        try:
            (self.folder / _CELLS).mkdir(parents=True, exist_ok=True)
            owner = f"{socket.gethostname()}-{os.getpid()}-"
            work = Path(tempfile.mkdtemp(prefix=f"{_WORK}{owner}", dir=self.folder))
            ready = work.with_name(_READY + work.name.removeprefix(_WORK))
            try:
                for cell in cells:
                    self._write(cell, work)
                os.replace(work, ready)
            finally:
                shutil.rmtree(work, ignore_errors=True)  # there only if something went wrong
            self._empty(ready)
        except OSError as error:
            raise OutputError(f"{self.folder}: can't be written ({error.strerror}).") from error

    def _write(self, cell: Cell, folder: Path) -> None:
        tokens = folder / f"{cell.key}.parquet"
        if cell.write_tokens is not None:
            cell.write_tokens(tokens)
        content = {
            "format": FORMAT,
            "key": cell.key,
            "status": cell.status,
            "config": dict(cell.config),
            "result": None if cell.result is None else dict(cell.result),
            "error": cell.error,
            "curve": [dict(epoch) for epoch in cell.curve],
            "provenance": dict(cell.provenance),
            "tokens_sha256": file_sha256(tokens) if cell.write_tokens is not None else None,
        }
        write_text(folder / f"{cell.key}.json", _sealed(content))

    def recover(self) -> None:
        """Finish the `put` of processes that were killed, and delete what they had half written."""
        if not self.folder.is_dir():
            return
        for ready in sorted(self.folder.glob(_READY + "*")):
            self._empty(ready)
        for work in self.folder.glob(f"{_WORK}*"):
            host, _, process = work.name.removeprefix(_WORK).rpartition("-")[0].rpartition("-")
            if host != socket.gethostname() or not process.isdecimal():
                continue
            if _is_running(int(process)):
                continue
            with contextlib.suppress(FileNotFoundError):  # renamed since it was listed
                if time.time() - work.stat().st_mtime > _STALE_S:
                    shutil.rmtree(work, ignore_errors=True)

    def _empty(self, ready: Path) -> None:
        """Move a folder's cells to the others. A result that is there stays: the first one wins."""
        for file in _listed(ready):
            if file.suffix != ".json":
                continue
            if self.finished([file.stem], lambda text: None):
                continue
            # The table first: a cell is there when its JSON is.
            for path in (file.with_suffix(".parquet"), file):
                with contextlib.suppress(FileNotFoundError):  # another process did it, or no table
                    os.replace(path, self.folder / _CELLS / path.name)
        shutil.rmtree(ready, ignore_errors=True)

    def finished(self, keys: Iterable[str], notice: Callable[[str], None]) -> set[str]:
        """Those of the keys whose cells have a result and an undamaged token table.

        Args:
            keys: of cells.
            notice: is called with a sentence for each damaged file; its cell counts as unfinished.
        """
        found = set()
        for key in keys:
            path = self.folder / _CELLS / f"{key}.json"
            if not path.is_file():
                continue
            try:
                content = _load(path)
                if content["status"] != "success":
                    continue
                if file_sha256(path.with_suffix(".parquet")) != content["tokens_sha256"]:
                    raise ValueError("its token table is not the one that was written")
            except (OSError, ValueError) as error:
                notice(f"{path}: not trusted ({error}). The cell is run again.")
                continue
            found.add(key)
        return found

    def read(self, keys: Container[str] | None = None) -> tuple[list[dict[str, Any]], list[str]]:
        """The content of the cells' files, and what is wrong with files that can't be read.

        Args:
            keys: of the cells that are wanted; None: all.

        Returns:
            The content of each readable file, by key in rising order; a sentence for each damaged
            file.
        """
        cells, wrong = {}, []
        for path in self._files():
            if keys is not None and path.stem not in keys:
                continue
            try:
                content = _load(path)
                cells[content["key"]] = content
            except FileNotFoundError:  # on its way to `cells`, which is listed last
                continue
            except (OSError, ValueError) as error:
                wrong.append(f"{path}: not trusted ({error}). Run the probe again.")
        return [cells[key] for key in sorted(cells)], wrong

    def _files(self) -> Iterator[Path]:
        for folder in (*sorted(self.folder.glob(_READY + "*")), self.folder / _CELLS):
            yield from (path for path in _listed(folder) if path.suffix == ".json")


def _sealed(content: Mapping[str, Any]) -> str:
    """JSON whose last entry is a hash of the text before it: whole, or it doesn't fit."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    body = text.removesuffix("\n}")
    return body + _seal(body.encode()).decode()


def _seal(body: bytes) -> bytes:
    return b',\n "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


_SEAL_BYTES = len(_seal(b""))


def _apart(data: bytes) -> tuple[bytes, bytes]:
    """A file's text, and what stands where the seal belongs; nothing if that is no seal."""
    body, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    return (body, seal) if seal.startswith(b',\n "sha256": "') else (data, b"")


def _listed(folder: Path) -> list[Path]:
    """The files in a folder; none if it is gone."""
    try:
        return [folder / name for name in os.listdir(folder)]
    except FileNotFoundError:
        return []


def _load(path: Path) -> dict[str, Any]:
    """A cell's file, if it is whole and what it says it is; else ValueError."""
    body, seal = _apart(path.read_bytes())
    if not seal:
        raise ValueError("truncated or damaged")
    if seal != _seal(body):
        raise ValueError("changed since it was written")
    content = json.loads(body + b"\n}")
    if content["format"] != FORMAT:
        raise ValueError(f"written in format {content['format']}, this version reads {FORMAT}")
    if path.stem != content["key"] or json_sha256(content["config"]) != content["key"]:
        raise ValueError("its name belongs to another cell")
    return content


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def read_cells(
    folder: str | Path,
    notice: Callable[[str], None] = lambda text: None,
    *,
    keys: Container[str] | None = None,
) -> list[dict[str, Any]]:
    """The cells of a probe as flat rows: `status`, settings, and what was measured.

    Args:
        folder: what `memlaw probe -o` wrote, or a JSON file of such rows (what
            `memlaw probe --json` prints).
        notice: is called with a sentence for each damaged file; damaged files are left out.
        keys: read only these cells of a folder; None: all.

    Returns:
        A row per cell, in the order of task, length, rank and seed; rows of a JSON file are in the
        file's order. See `ProbeResult`.

    Raises:
        DataError: the folder or file doesn't exist or holds no cells, or the file isn't such a
            list.
    """
    if Path(folder).is_file():
        return _read_table(Path(folder))
    if not Path(folder).exists():
        raise DataError(
            f"{folder} does not exist. Name a folder that 'memlaw probe -o' wrote, or a file that "
            "'memlaw probe --json' printed."
        )
    cells, wrong = CellStore(folder).read(keys)
    for text in wrong:
        notice(text)
    if not cells:
        raise DataError(f"{folder} holds no cells. Name a folder that 'memlaw probe -o' wrote.")
    rows = [
        {"status": cell["status"], "key": cell["key"], "error": cell["error"]}
        | {k: v for k, v in cell["config"].items() if k != "training"}
        | cell["config"]["training"]
        | (cell["result"] or {})
        | {name: cell["provenance"].get(name) for name in ("wall_s", "model", "texts")}
        for cell in cells
    ]
    return sorted(rows, key=lambda row: [row[name] for name in ("task", "length", "rank", "seed")])


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable JSON file of cells ({error}).") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{path}: not a list of cells. Name a folder that 'memlaw probe -o' wrote, or what "
            "'memlaw probe --json' printed."
        )
    return rows
