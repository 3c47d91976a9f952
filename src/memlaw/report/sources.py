"""What a report is made from: write folders, audits, probe stores; each read into plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memlaw.core.errors import DataError
from memlaw.core.files import ANSWERS_FILE, CERTIFICATE_FILE, RUN_FILE, TOKENS_FILE, read_json
from memlaw.law.store import read_cells
from memlaw.measure.files import read_audit_json, read_parquet
from memlaw.report.generations import read_generations
from memlaw.report.probe_view import ProbeView, probes_of
from memlaw.report.run_view import RunView
from memlaw.train.snapshots import SNAPSHOTS_FILE, Snapshots, read_snapshots

_SAID: dict[str, tuple[type, ...]] = {  # by the page, of a certificate
    "certified": (bool,),
    "n_certified": (int,),
    "dtype": (str,),
    "device": (str,),
    "prompt_format": (str,),
    "versions": (dict,),
    "damage": (dict,),
    "damage.n_tokens": (int,),
    "rounding": (dict, type(None)),
    "rounding.flips_per_1000": (int, float),
    "harms": (dict, type(None)),
    "harms.elsewhere": (dict, type(None)),
    **dict.fromkeys((f"harms.elsewhere.{count}" for count in ("n", "unchanged", "floor")), (int,)),
    "harms.elsewhere.share_of_floor": (int, float),
    "harms.elsewhere.share_of_floor_ci95": (list,),
}


def read_source(path: Path) -> RunView | list[ProbeView]:
    """Read one of the things a report is made from, whichever it is.

    Args:
        path: a write folder, a token table (Parquet) or JSON of `memlaw audit`, a probe's folder or
            JSON.

    Returns:
        A run or audit; or, of a probe, one view for each setting.

    Raises:
        DataError: it is none of these, or damaged.
    """
    if path.is_dir():
        if (path / TOKENS_FILE).is_file():
            return _write_folder(path)
        if (path / "shards").is_dir():
            raise DataError(f"{path} holds shards. Name those to show: {path / 'shards' / '…'}.")
        try:
            cells = read_cells(path)
        except DataError as error:
            raise DataError(
                f"{path} holds neither a token table ({TOKENS_FILE}) nor the cells of a probe. "
                "Name a folder that memlaw wrote."
            ) from error
        return probes_of(cells, name=_name(path))
    if not path.is_file():
        raise DataError(f"{path} does not exist. Name a write folder, an audit or a probe store.")
    if path.suffix == ".json":
        if _is_list(path):
            return probes_of(read_cells(path), name=_name(path))
        return RunView(name=_name(path), recall=read_audit_json(path))
    return RunView(name=_name(path), recall=read_parquet(path))


def _is_list(path: Path) -> bool:
    """It is what `memlaw probe --json` printed, not an audit."""
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"[")


def _name(path: Path) -> str:
    return path.absolute().name


def _write_folder(path: Path) -> RunView:
    certificate = _certificate(path / CERTIFICATE_FILE)
    recall = read_parquet(path / TOKENS_FILE, certificate)
    run = _object(path / RUN_FILE)
    return RunView(
        name=_name(path),
        recall=recall,
        snapshots=_snapshots(path / SNAPSHOTS_FILE, len(recall.tokens)),
        certificate=certificate,
        run=run,
        answers=_object(path / ANSWERS_FILE),
        earlier=read_generations(path, len((run or {}).get("generations", [None]))),
    )


def _certificate(path: Path) -> dict[str, Any] | None:
    """A folder's certificate, if it has one, with all that the page says of it.

    The whole check, `memlaw.certify.read_certificate`, needs torch.
    """
    if (content := _object(path)) is None:
        return None
    for name, kinds in _SAID.items():
        *outer, inner = name.split(".")
        holder: Any = content
        for part in outer:  # an object, or not on record: it stands above
            holder = None if holder is None else holder.get(part)
        if holder is None:
            continue
        value = holder.get(inner)
        if type(value) not in kinds:
            raise DataError(
                f"{path} is not a certificate: {name} is {value!r:.40}. Fetch it again, or write "
                "anew."
            )
    return content


def _object(path: Path) -> dict[str, Any] | None:
    return read_json(path, DataError, "Make it again.") if path.is_file() else None


def _snapshots(path: Path, n_tokens: int) -> Snapshots | None:
    """The snapshots of so many tokens; None where there are none, or those of other tokens."""
    if not path.is_file():
        return None
    found = read_snapshots(path)
    return found if found.n_tokens == n_tokens and found.epochs else None
