"""What the page's script draws the records of a run from."""

from __future__ import annotations

from typing import Any

import numpy as np

from memlaw.measure.files import SavedAudit
from memlaw.report.embed import array
from memlaw.report.run_view import RunView

_MOST_TOKENS = 300_000  # shown one by one; more would make a file of many megabytes
_MOST_SNAPSHOT_BYTES = 2_000_000


def recall_data(view: RunView) -> dict[str, Any]:
    """What the page's script draws records from; numbers as base64 of little-endian arrays."""
    recall, tokens = view.recall, view.recall.tokens
    starts, correct = tokens.starts, tokens.correct
    shown = _shown_records(recall)
    rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in shown])
    texts: dict[str, int] = {}
    token = [texts.setdefault(recall.token[i], len(texts)) for i in rows.tolist()]
    wrong = [k for k, i in enumerate(rows.tolist()) if not correct[i]]
    rivals = [texts.setdefault(recall.argmax[rows[k]], len(texts)) for k in wrong]
    content: dict[str, Any] = {
        "line": recall.criterion.line,
        "left_out": len(recall.records) - len(shown),
        "records": [
            [
                r.id,
                recall.titles[i],
                r.n_tokens,
                r.first_failure,
                r.cascade_tokens,
                r.decoded_recalled,
                None if r.decoded_recalled else recall.decoded[i],
                r.argmax_recalled,
            ]
            for i, r in ((i, recall.records[i]) for i in shown)
        ],
        "texts": list(texts),
        "token": array(token, "<u4"),
        "nll": array(np.nan_to_num(tokens.nll_nats[rows], nan=1e9, posinf=1e9), "<f4"),
        "margin": array(np.nan_to_num(tokens.margin_nats[rows], nan=0.0), "<f4"),
        "wrong": array(wrong, "<u4"),
        "rivals": array(rivals, "<u4"),
    }
    if kept := view.snapshots:
        most = max(1, _MOST_SNAPSHOT_BYTES // len(rows))
        picked = np.unique(np.linspace(0, len(kept.epochs) - 1, min(most, len(kept.epochs))))
        chosen = [int(i) for i in picked]
        content["epochs"] = [kept.epochs[i] for i in chosen]
        seen = np.stack([kept.p[i][rows] for i in chosen]).astype(np.float32)
        content["seen"] = array(np.clip(np.nan_to_num(seen) * 255, 0, 255), "u1")
    return content


def _shown_records(recall: SavedAudit) -> list[int]:
    """All records; where that is too much, those with the least probable tokens, in order."""
    if len(recall.tokens) <= _MOST_TOKENS:
        return list(range(len(recall.records)))
    low = np.minimum.reduceat(recall.tokens.p, recall.tokens.starts[:-1])
    room = _MOST_TOKENS
    found: list[int] = []
    for i in np.argsort(low, kind="stable").tolist():
        if found and recall.records[i].n_tokens > room:
            break
        found.append(i)
        room -= recall.records[i].n_tokens
    return sorted(found)
