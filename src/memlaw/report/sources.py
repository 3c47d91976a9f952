"""What a report is made from: write folders, audits, probe stores; each read into plain data."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from memlaw.core.errors import DataError
from memlaw.core.files import CERTIFICATE_FILE, RUN_FILE, TOKENS_FILE
from memlaw.law.comparison import compare_cells
from memlaw.law.estimator import LawError
from memlaw.law.forms import FORMS
from memlaw.law.memory_law import MemoryLaw
from memlaw.law.recall_law import RecallLaw
from memlaw.law.rows import SETTING_COLUMNS, cell_arrays, number
from memlaw.law.store import read_cells
from memlaw.train.snapshots import SNAPSHOTS_FILE, Snapshots, read_snapshots

Cell = Mapping[str, Any]
_COLUMNS = ("record", "position", "token", "nll_nats", "argmax", "margin_nats")
_DRAWN = ("rank", "n_tokens", "nll", "delta_nll", "recall")  # of every cell
_CURVE = 25  # points of a fitted line
_Z = [z / 4 for z in range(-12, 14)]  # probabilities from 0.0013 to 0.9994
_BEYOND, _PLAN_LENGTHS, _PLAN_SIZES = 8, 33, 60  # of the planner's table


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
    """The law of recall, as the page's calculator needs it: a table to interpolate in.

    T lengths, Z standard normal quantiles.

    Attributes:
        log_tokens: [T] rising: ln of a number of target tokens.
        z: [Z] rising: Φ⁻¹ of the probability of a certificate.
        log_rank: [T, Z]: ln of the (fractional) rank that has this probability.
        parameters_per_rank: trained numbers that a rank more costs.
        tokens, ranks: lowest and highest of what was measured; outside it extrapolates.
        bytes_per_parameter: of an adapter on disk.
    """

    log_tokens: Sequence[float]
    z: Sequence[float]
    log_rank: Sequence[Sequence[float]]
    parameters_per_rank: float
    tokens: tuple[int, int]
    ranks: tuple[int, int]
    bytes_per_parameter: int = 4

    def rank(self, n_tokens: float, confidence: float) -> int:
        """The smallest rank with this probability of a certificate; as the page computes it."""
        column = self._at(n_tokens)
        return max(1, math.ceil(math.exp(_along(NormalDist().inv_cdf(confidence), self.z, column))))

    def probability(self, rank: float, n_tokens: float) -> float:
        """That an adapter of this rank can be certified on so many tokens."""
        return NormalDist().cdf(_along(math.log(rank), self._at(n_tokens), self.z))

    def _at(self, n_tokens: float) -> list[float]:
        columns = zip(*self.log_rank, strict=True)
        return [_along(math.log(n_tokens), self.log_tokens, column) for column in columns]


def _along(at: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """The broken line through (xs, ys) at a place; straight on beyond its ends."""
    i = min(max(bisect_right(xs, at), 1), len(xs) - 1)
    return ys[i - 1] + (at - xs[i - 1]) * (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])


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
        path: a write folder, a token table (Parquet) or JSON of `memlaw audit`, a probe's folder or
            JSON.

    Raises:
        DataError: it is none of these, or damaged.
    """
    if path.is_dir():
        if (path / TOKENS_FILE).is_file():
            return _write_folder(path)
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
        return _audit_json(path)
    return RunView(name=_name(path), recall=_token_table(path, None))


def _is_list(path: Path) -> bool:
    """It is what `memlaw probe --json` printed, not an audit."""
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"[")


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
        raise DataError(
            f"{path} can't be read as Parquet ({error}). Name a write folder, an audit or a probe "
            "store."
        ) from error
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


def probes_of(cells: Sequence[Cell], *, name: str) -> list[ProbeView]:
    """The cells task by task and setting by setting, with the laws that can be fitted to them.

    Raises:
        LawError: no cell is finished, or one lacks what is drawn of all.
    """
    done = [cell for cell in cells if cell.get("status", "success") == "success"]
    if not done:
        raise LawError(f"{name}: no finished cell among {len(cells)}. Run the probe first.")
    for cell in done:
        for column in _DRAWN:
            number(cell, column)
    told = [column for column in SETTING_COLUMNS[:-1] if _differs(done, column)]
    # The last is a hash of all of a setting: named only where nothing else tells two apart.
    seen = {tuple(str(cell.get(c)) for c in told) for cell in done}
    if len({(cell.get(SETTING_COLUMNS[-1]), cell.get("task")) for cell in done}) > len(seen):
        told.append(SETTING_COLUMNS[-1])
    groups: dict[str, list[Cell]] = {}
    for cell in done:
        key = [str(cell[column])[:24] for column in told if column in cell]
        groups.setdefault(", ".join(key) or str(cell.get("task")), []).append(cell)
    return [
        ProbeView(name=f"{name}: {key}", cells=own, law=law_of(own), plan=plan_of(own))
        for key, own in groups.items()
    ]


def _differs(cells: Sequence[Cell], column: str) -> bool:
    return len({str(cell.get(column)) for cell in cells}) > 1


_LETTERS = {"alpha": "α", "beta": "β"}


def law_of(cells: Sequence[Cell]) -> LawView | None:
    """The law in the paper's form, fitted to cells of one setting; None where it can't be."""
    try:
        law = MemoryLaw().fit_cells(cells)
        forms = compare_cells(cells)
        X, y, censored, _ = cell_arrays(cells)
    except LawError:
        return None
    ranks, lengths = (np.unique(X[:, column]) for column in (0, 1))
    lines = [
        *((rank, n) for rank in ranks for n in np.geomspace(lengths[0], lengths[-1], _CURVE)),
        *((rank, n) for n in lengths for rank in np.geomspace(ranks[0], ranks[-1], _CURVE)),
    ]
    base = float(X[:, 2].mean())
    drawn = law.predict([[rank, n, base] for rank, n in lines])
    return LawView(
        form=law.form,
        equation=FORMS[law.form].equation,
        parameters=[
            Parameter(
                name=_LETTERS.get(name, name),
                value=value,
                low=law.intervals_[name][0],
                high=law.intervals_[name][1],
            )
            for name, value in law.params_.items()
        ],
        r2=law.r2_,
        points=[
            {
                "rank": int(x[0]),
                "n_tokens": int(x[1]),
                "measured": float(measured),
                "predicted": float(predicted),
                "residual": float(measured - predicted),
                "censored": bool(cut),
            }
            for x, measured, predicted, cut in zip(X, y, law.predict(X), censored, strict=True)
        ],
        curves=[
            {"rank": float(rank), "n_tokens": float(n), "predicted": float(value)}
            for (rank, n), value in zip(lines, drawn, strict=True)
        ],
        comparison=[
            {
                "form": found.form,
                "parameters": found.n_parameters,
                "R²": found.r2,
                "ΔAICc": found.delta_aicc,
                "error on the longest": _percent(found.held_out_length_error),
                "on the largest rank": _percent(found.held_out_size_error),
            }
            for found in forms
        ],
        notes=law.identifiability_.statements,
    )


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def plan_of(cells: Sequence[Cell]) -> PlanView | None:
    """The law of recall, fitted to cells of one setting; None where it can't be."""
    try:
        law = RecallLaw().fit_cells(cells)
        per_rank = {number(cell, "n_parameters") / cell["rank"] for cell in cells}
    except LawError:
        return None
    if max(per_rank) > 1.001 * min(per_rank):
        return None
    ranks, tokens = ([int(cell[column]) for cell in cells] for column in ("rank", "n_tokens"))
    ends = [NormalDist().cdf(z) for z in (_Z[0], _Z[-1])]
    lengths = np.geomspace(min(tokens) / _BEYOND, max(tokens) * _BEYOND, _PLAN_LENGTHS)
    table = []
    for n in lengths:
        low, high = (math.log(law.size_quantile(n, p)) for p in ends)
        sizes = np.linspace(low, high, _PLAN_SIZES)
        p = law.probability(np.column_stack([np.exp(sizes), np.full(len(sizes), n)]))
        z = [NormalDist().inv_cdf(min(max(float(q), 1e-9), 1 - 1e-9)) for q in p]
        table.append(np.interp(_Z, z, sizes).round(5).tolist())
    return PlanView(
        log_tokens=np.log(lengths).tolist(),
        z=_Z,
        log_rank=table,
        parameters_per_rank=min(per_rank),
        tokens=(min(tokens), max(tokens)),
        ranks=(min(ranks), max(ranks)),
    )
