"""What a report is made from: write folders, audits, probe stores; each read into plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from memlaw.errors import DataError
from memlaw.snapshots import SNAPSHOTS_FILE, Snapshots, read_snapshots
from memlaw.store import CERTIFICATE_FILE, RUN_FILE, TOKENS_FILE

Cell = Mapping[str, Any]
_COLUMNS = ("record", "position", "token", "nll_nats", "argmax", "margin_nats")


@dataclass(frozen=True, kw_only=True)
class RecordRow:
    """One record of an audit.

    Attributes:
        id: where it comes from.
        title: its prompt in a line; empty where that is not on record.
        n_tokens: its target tokens, the end of the turn among them.
        certified: every token over the line and recited; None: not all of it was measured.
        argmax_recalled: teacher-forced, every token is the argmax.
        decoded_recalled: greedy decoding gave the record; None: not on record.
        first_failure: position of the first token that isn't the argmax; None if all are.
        cascade_tokens: tokens that greedy decoding got wrong; None: not on record.
        decoded: what greedy decoding gave, where that is on record.
    """

    id: str
    title: str
    n_tokens: int
    certified: bool | None
    argmax_recalled: bool
    decoded_recalled: bool | None
    first_failure: int | None
    cascade_tokens: int | None
    decoded: str | None


@dataclass(frozen=True, kw_only=True)
class Recall:
    """What is recalled, token by token. N target tokens, record after record.

    Attributes:
        records: in the order of the table.
        token: N texts of the tokens that belong there.
        nll_nats: [N] float32.
        argmax: N texts of the tokens that the model would say.
        wrong: [N] bool: that is another token.
        margin_nats: [N] float32: the right token's logit less the best other's.
        line: p that a token needs for the certificate.
        dtype: what the model computed in; None: not on record.
        snapshots: p as training saw it, epoch by epoch; None where none was kept.
    """

    records: Sequence[RecordRow]
    token: Sequence[str] = field(repr=False)
    nll_nats: np.ndarray = field(repr=False)
    argmax: Sequence[str] = field(repr=False)
    wrong: np.ndarray = field(repr=False)
    margin_nats: np.ndarray = field(repr=False)
    line: float
    dtype: str | None
    snapshots: Snapshots | None = field(repr=False)

    @property
    def p(self) -> np.ndarray:
        """[N] float64 in [0, 1]: the probability of the right token."""
        return np.exp(-self.nll_nats.astype(np.float64))

    @property
    def starts(self) -> np.ndarray:
        """[records + 1] int64: where each record's tokens start, and where the last ones end."""
        return np.cumsum([0, *(r.n_tokens for r in self.records)])


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A write folder or an audit.

    Attributes:
        name: what the page calls it.
        recall: the token table.
        certificate, run: the content of `certificate.json` and `run.json`; None without one.
    """

    name: str
    recall: Recall
    certificate: dict[str, Any] | None = None
    run: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A fitted parameter with its 95 % interval; an end is None where the data give none."""

    name: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class LawView:
    """A fitted law, as numbers.

    Attributes:
        form: its name.
        equation: it in a line of text.
        parameters: what was fitted.
        r2: on the cells that aren't censored; None where that makes no sense.
        points: for each cell `rank`, `n_tokens`, `seed`, `measured`, `predicted`, `residual`
            (measured less predicted), `censored`.
        curves: the fit between the cells: `rank`, `n_tokens`, `predicted`.
        comparison: a row a form: name to number or text.
        notes: sentences about what the data can't tell.
    """

    form: str
    equation: str
    parameters: Sequence[Parameter]
    r2: float | None
    points: Sequence[Mapping[str, Any]] = field(repr=False)
    curves: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    comparison: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class PlanView:
    """The law of recall, as the page's calculator needs it.

    P(certified) = Φ(intercept + size_slope · ln n_parameters − token_slope · ln n_tokens).

    Attributes:
        intercept, size_slope, token_slope: of that; both slopes are above 0.
        parameters_per_rank: trained numbers that a rank more costs.
        max_rank: the highest rank that fits the site.
        tokens, ranks: lowest and highest of what was measured; outside it extrapolates.
        bytes_per_parameter: of an adapter on disk.
        measured_on: what the law was measured on, in a few words.
    """

    intercept: float
    size_slope: float
    token_slope: float
    parameters_per_rank: int
    max_rank: int
    tokens: tuple[int, int]
    ranks: tuple[int, int]
    bytes_per_parameter: int = 4
    measured_on: str = ""

    def probability(self, rank: float, n_tokens: float) -> float:
        """That an adapter of this rank can be certified on so many tokens."""
        z = (
            self.intercept
            + self.size_slope * math.log(rank * self.parameters_per_rank)
            - self.token_slope * math.log(n_tokens)
        )
        return 0.5 * (1 + math.erf(z / math.sqrt(2)))


@dataclass(frozen=True, kw_only=True)
class ProbeView:
    """The cells of one task, and what was fitted to them."""

    name: str
    cells: Sequence[Cell] = field(repr=False)
    law: LawView | None = None
    plan: PlanView | None = None


def read_source(path: Path) -> RunView | list[ProbeView]:
    """Read one of the things a report is made from, whichever it is.

    Args:
        path: a write folder, a token table (Parquet) or JSON of `memlaw audit`, a probe store.

    Raises:
        DataError: it is none of these, or damaged.
    """
    if path.is_dir():
        if (path / TOKENS_FILE).is_file():
            return _write_folder(path)
        cells = probe_cells(path)
        if not cells:
            raise DataError(
                f"{path} holds neither a token table ({TOKENS_FILE}) nor the cells of a probe. "
                "Name a folder that memlaw wrote."
            )
        return probes_of(cells, name=_name(path))
    if not path.is_file():
        raise DataError(f"{path} does not exist. Name a write folder, an audit or a probe store.")
    if path.suffix == ".json":
        return _audit_json(path)
    return RunView(name=_name(path), recall=_token_table(path, None))


def _name(path: Path) -> str:
    return path.absolute().name


def _write_folder(path: Path) -> RunView:
    snapshots = path / SNAPSHOTS_FILE
    certificate = _read_json(path / CERTIFICATE_FILE)
    recall = _token_table(
        path / TOKENS_FILE,
        certificate,
        read_snapshots(snapshots) if snapshots.is_file() else None,
    )
    return RunView(
        name=_name(path),
        recall=recall,
        certificate=certificate,
        run=_read_json(path / RUN_FILE),
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read ({error}). Make it again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not what it should be: no JSON object.")
    return content


def _token_table(
    path: Path, certificate: Mapping[str, Any] | None, snapshots: Snapshots | None = None
) -> Recall:
    """A Parquet file of `Audit.write_tokens`; older ones have no verdicts in their metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} can't be read as Parquet ({error}).") from error
    if missing := sorted(set(_COLUMNS) - set(table.column_names)):
        raise DataError(
            f"{path} is no token table: it has no column {', '.join(missing)}. Make one with "
            "'memlaw audit DATA --tokens FILE'."
        )
    summary = json.loads((table.schema.metadata or {}).get(b"memlaw", b"{}"))
    column = {name: table[name].to_pylist() for name in ("record", "token", "argmax")}
    nll = table["nll_nats"].to_numpy().astype(np.float32)
    margin = table["margin_nats"].to_numpy().astype(np.float32)
    ids = ("token_id", "argmax_id")
    by_id = set(ids) <= set(table.column_names)
    said = [table[name].to_numpy() if by_id else np.array(column[name[:-3]]) for name in ids]
    wrong = said[0] != said[1]
    starts = np.flatnonzero(table["position"].to_numpy() == 0).tolist()
    verdicts = {r["id"]: r for r in (certificate or {}).get("records", [])}
    found = summary.get("records") or [
        verdicts.get(column["record"][start], {}) | {"id": column["record"][start]}
        for start in starts
    ]
    return _recall(
        found,
        summary or certificate or {},
        starts=starts,
        token=column["token"],
        nll=nll,
        argmax=column["argmax"],
        wrong=wrong,
        margin=margin,
        snapshots=snapshots,
        path=path,
    )


def _audit_json(path: Path) -> RunView:
    content = _read_json(path) or {}
    try:
        tokens = [token for record in content["records"] for token in record["tokens"]]
        starts = np.cumsum([0, *(len(r["tokens"]) for r in content["records"])])[:-1].tolist()
        recall = _recall(
            content["records"],
            content,
            starts=starts,
            token=[t["token"] for t in tokens],
            nll=np.array([t["nll_nats"] for t in tokens], np.float32),
            argmax=[t["argmax"] for t in tokens],
            wrong=np.array([t["argmax_id"] != t["token_id"] for t in tokens], bool),
            margin=np.array([t["margin_nats"] for t in tokens], np.float32),
            snapshots=None,
            path=path,
        )
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no audit ({type(error).__name__}: {error}). Make one with 'memlaw audit "
            "DATA --json > FILE'."
        ) from error
    return RunView(name=_name(path), recall=recall)


def _recall(
    found: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    *,
    starts: Sequence[int],
    token: Sequence[str],
    nll: np.ndarray,
    argmax: Sequence[str],
    wrong: np.ndarray,
    margin: np.ndarray,
    snapshots: Snapshots | None,
    path: Path,
) -> Recall:
    if len(found) != len(starts) or not found:
        raise DataError(f"{path} is damaged: {len(starts)} records, {len(found)} verdicts.")
    rows = []
    for record, start, stop in zip(found, starts, [*starts[1:], len(token)], strict=True):
        missed = np.flatnonzero(wrong[start:stop])
        decoded = record.get("decoded_recalled", record.get("recalled"))
        rows.append(
            RecordRow(
                id=str(record["id"]),
                title=str(record.get("title", "")),
                n_tokens=stop - start,
                certified=record.get("certified") if decoded is not None else None,
                argmax_recalled=len(missed) == 0,
                decoded_recalled=decoded,
                first_failure=int(missed[0]) if len(missed) else None,
                cascade_tokens=record.get("cascade_tokens"),
                decoded=record.get("decoded"),
            )
        )
    if snapshots is not None and (snapshots.n_tokens != len(token) or not snapshots.epochs):
        snapshots = None
    return Recall(
        records=rows,
        token=token,
        nll_nats=nll,
        argmax=argmax,
        wrong=wrong,
        margin_nats=margin,
        line=float(summary.get("threshold", 0.5)) + float(summary.get("margin", 0.05)),
        dtype=summary.get("dtype"),
        snapshots=snapshots,
    )


# ---------------------------------------------------------------- probe, law, plan


def probe_cells(path: Path) -> list[Cell]:
    """The cells in a probe's folder, a flat row each."""
    cells: list[Cell] = []
    for file in sorted(path.glob("**/*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and {"task", "rank", "n_tokens", "status"} <= set(content):
            cells.append(content)
    return cells


def probes_of(cells: Sequence[Cell], *, name: str) -> list[ProbeView]:
    """The cells task by task, each with the law that was fitted to them, where one can be."""
    done = [cell for cell in cells if cell.get("status", "success") == "success"]
    tasks = dict.fromkeys(str(cell["task"]) for cell in done)
    found = []
    for task in tasks:
        own = [cell for cell in done if cell["task"] == task]
        law, plan = law_of(own), plan_of(own)
        found.append(ProbeView(name=f"{name}: {task}", cells=own, law=law, plan=plan))
    return found


def law_of(cells: Sequence[Cell]) -> LawView | None:
    """The law fitted to one task's cells; None where they are too few."""
    return None


def plan_of(cells: Sequence[Cell]) -> PlanView | None:
    """The law of recall fitted to one task's cells; None where they are too few."""
    return None
