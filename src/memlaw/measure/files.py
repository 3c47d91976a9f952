"""The files of an audit: the token table as Parquet, the audit as JSON; written and read here.

Both hold the texts of tokens, so that reading them needs neither tokenizer nor torch. A Parquet
file's metadata holds, under the key `memlaw`, the totals and a verdict for each record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from memlaw.core.criterion import Criterion
from memlaw.core.errors import DataError
from memlaw.core.files import atomic_path, read_json
from memlaw.measure.table import AuditResult, TokenTable, verdicts

_METADATA = b"memlaw"
_NEEDED = ("record", "position", "token", "nll_nats", "argmax", "margin_nats")  # Parquet columns
_TOKEN_KEYS = ("token", "token_id", "p", "nll_nats", "argmax", "argmax_id", "margin_nats")  # JSON
_DECODED = "decoded_margin_nats"  # likewise in both; older files don't have it


@dataclass(frozen=True, kw_only=True)
class SavedAudit(AuditResult):
    """An audit as its files hold it: with the texts of its tokens, without a model.

    Attributes:
        titles: for each record its prompt in a line; empty where that is not on record.
        decoded: for each record the text that greedy decoding gave; None where it was not run, or
            its text is not on record.
        token: N texts, of the tokens that belong there.
        argmax: N texts, of the most probable tokens.
    """

    titles: Sequence[str] = field(repr=False)
    decoded: Sequence[str | None] = field(repr=False)
    token: Sequence[str] = field(repr=False)
    argmax: Sequence[str] = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """Totals, and for each record its verdict, its title and what was decoded; as JSON."""
        return {
            "n_records": len(self.records),
            "n_certified": self.n_certified,
            "n_recalled": self.n_recalled,
            "n_decoded": self.n_decoded,
            "n_disagreements": len(self.disagreements),
            "n_tokens": len(self.tokens),
            "n_tokens_under": self.n_under,
            "rounding": self.rounding(),
            "nll_nats": self.nll_nats,
            "threshold": self.threshold,
            "margin": self.margin,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            **({} if self.end else {"end": False}),
            **self._extraction(),
            "records": [
                {
                    "id": verdict.id,
                    "sha256": verdict.sha256,
                    "title": title,
                    "certified": verdict.certified,
                    "recalled": verdict.recalled,
                    "argmax_recalled": verdict.argmax_recalled,
                    "decoded_recalled": verdict.decoded_recalled,
                    "first_failure": verdict.first_failure,
                    "cascade_tokens": verdict.cascade_tokens,
                    "min_p": verdict.min_p,
                    "n_under": verdict.n_under,
                    "flip_risk": verdict.flip_risk,
                    "decoded": decoded,
                }
                for verdict, title, decoded in zip(
                    self.records, self.titles, self.decoded, strict=True
                )
            ],
        }

    def _extraction(self) -> dict[str, Any]:
        """Of documents: how long their prefixes are, and the share that is extracted."""
        if self.prefix_tokens is None:
            return {}
        share, low, high = self.share_recalled
        return {
            "prefix_tokens": self.prefix_tokens,
            "share_extracted": share,
            "share_extracted_ci95": [low, high],
        }

    def to_json(self) -> dict[str, Any]:
        """The summary, with the tokens of each record: what `memlaw audit --json` prints."""
        content, tokens = self.summary(), self.tokens
        columns: dict[str, Sequence[Any]] = {
            "token": self.token,
            "argmax": self.argmax,
            "token_id": tokens.token_id.tolist(),
            "p": tokens.p.tolist(),
            "nll_nats": tokens.nll_nats.tolist(),
            "argmax_id": tokens.argmax_id.tolist(),
            "margin_nats": tokens.margin_nats.tolist(),
            _DECODED: [None if np.isnan(m) else m for m in tokens.decoded_margin_nats.tolist()],
        }
        for i, record in enumerate(content["records"]):
            rows = self.token_rows(i)
            own = zip(*(column[rows] for column in columns.values()), strict=True)
            record["tokens"] = [dict(zip(columns, values, strict=True)) for values in own]
        return content

    def write_parquet(self, path: Path) -> None:
        """Write the token table as Parquet, atomically."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        tokens = self.tokens
        table = pa.table(
            {
                "record": [self.records[i].id for i in tokens.record],
                "position": tokens.position,
                "token_id": tokens.token_id,
                "token": self.token,
                "p": tokens.p,
                "nll_nats": tokens.nll_nats,
                "argmax_id": tokens.argmax_id,
                "argmax": self.argmax,
                "margin_nats": tokens.margin_nats,
                _DECODED: tokens.decoded_margin_nats,
            }
        )
        summary = json.dumps(self.summary(), ensure_ascii=False)
        with atomic_path(path) as work:
            pq.write_table(table.replace_schema_metadata({_METADATA: summary}), work)


def read_parquet(path: Path, certificate: Mapping[str, Any] | None = None) -> SavedAudit:
    """Read what `SavedAudit.write_parquet` wrote; older files lack verdicts and token ids.

    Args:
        path: the file.
        certificate: the content of the `certificate.json` beside it, which has the verdicts that
            the file may lack.

    Raises:
        DataError: it is no token table, or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        names = set(table.column_names)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(
            f"{path} can't be read as Parquet ({error}). Name a write folder, an audit or a probe "
            "store."
        ) from error
    if missing := sorted(set(_NEEDED) - names):
        raise DataError(
            f"{path} is no token table: it has no column {', '.join(missing)}. Make one with "
            "'memlaw audit DATA --tokens FILE'."
        )
    try:
        return _of_columns(path, table, certificate)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}). Fetch or make it again."
        ) from error


def _of_columns(path: Path, table: Any, certificate: Mapping[str, Any] | None) -> SavedAudit:
    """See `read_parquet`."""
    summary = json.loads((table.schema.metadata or {}).get(_METADATA, b"{}"))
    id, token, argmax = (table[name].to_pylist() for name in ("record", "token", "argmax"))
    names = set(table.column_names)
    if {"token_id", "argmax_id"} <= names:
        token_ids, argmax_ids = (table[name].to_numpy() for name in ("token_id", "argmax_id"))
    else:
        numbers: dict[str, int] = {}  # made up: the same text, the same id
        token_ids, argmax_ids = (
            np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int64)
            for texts in (token, argmax)
        )
    position = table["position"].to_numpy()
    found = summary.get("records")
    if not found:
        known = {line["id"]: line for line in (certificate or {}).get("records", [])}
        first = [id[start] for start in np.flatnonzero(position == 0)]
        found = [known.get(name, {}) | {"id": name} for name in first]
    return _saved(
        path,
        summary or certificate or {},
        found,
        token=token,
        argmax=argmax,
        position=position,
        token_id=token_ids,
        argmax_id=argmax_ids,
        nll=table["nll_nats"].to_numpy(),
        margin=table["margin_nats"].to_numpy(),
        decoded_margin=table[_DECODED].to_numpy() if _DECODED in names else None,
    )


def read_audit_json(path: Path) -> SavedAudit:
    """Read what `memlaw audit --json` printed.

    Raises:
        DataError: it is no audit, or damaged.
    """
    content = read_json(path, DataError, "Make it again.")
    try:
        tokens = [token for record in content["records"] for token in record["tokens"]]
        lengths = [len(record["tokens"]) for record in content["records"]]
        column = {key: [token[key] for token in tokens] for key in _TOKEN_KEYS if key != "p"}
        return _saved(
            path,
            content,
            content["records"],
            token=column["token"],
            argmax=column["argmax"],
            position=np.concatenate([np.arange(0), *map(np.arange, lengths)]),
            token_id=np.array(column["token_id"]),
            argmax_id=np.array(column["argmax_id"]),
            nll=np.array(column["nll_nats"], np.float32),
            margin=np.array(column["margin_nats"], np.float32),
            decoded_margin=np.array([token.get(_DECODED) for token in tokens], np.float32),
        )
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is no audit ({type(error).__name__}: {error}). Make one with 'memlaw audit "
            "DATA --json > FILE'."
        ) from error


def _saved(
    path: Path,
    summary: Mapping[str, Any],
    found: Sequence[Mapping[str, Any]],
    *,
    token: Sequence[str],
    argmax: Sequence[str],
    position: np.ndarray,
    token_id: np.ndarray,
    argmax_id: np.ndarray,
    nll: np.ndarray,
    margin: np.ndarray,
    decoded_margin: np.ndarray | None,
) -> SavedAudit:
    """What the columns and verdicts of a file say together; each [N], a verdict for each record."""
    begins = position == 0
    if len(found) != begins.sum() or not found:
        raise DataError(f"{path} is damaged: {begins.sum()} records, {len(found)} verdicts.")
    tokens = TokenTable(
        record=np.cumsum(begins) - 1,
        position=position,
        token_id=token_id,
        nll_nats=nll.astype(np.float32),
        argmax_id=argmax_id,
        margin_nats=margin.astype(np.float32),
        decoded_margin_nats=(
            np.full(len(margin), np.nan, np.float32)
            if decoded_margin is None
            else decoded_margin.astype(np.float32)
        ),
    )
    usual = Criterion()
    criterion = Criterion(
        float(summary.get("threshold", usual.threshold)), float(summary.get("margin", usual.margin))
    )
    verdict_fields = [
        {
            "id": str(record["id"]),
            "sha256": str(record.get("sha256", "")),
            # A certificate says `recalled` only, of records that were all decoded.
            "decoded_recalled": record.get("decoded_recalled", record.get("recalled")),
            "cascade_tokens": record.get("cascade_tokens"),
            "decoded_ids": None,
        }
        for record in found
    ]
    return SavedAudit(
        records=verdicts(tokens, verdict_fields, criterion.line),
        tokens=tokens,
        threshold=criterion.threshold,
        margin=criterion.margin,
        dtype=str(summary.get("dtype") or ""),
        batch_size=int(summary.get("batch_size", 0)),
        end=bool(summary.get("end", True)),
        prefix_tokens=summary.get("prefix_tokens"),
        titles=[str(record.get("title", "")) for record in found],
        decoded=[record.get("decoded") for record in found],
        token=token,
        argmax=argmax,
    )
