"""How good is an audit's forecast of what other batches say? The same margins, in eight ways.

    python benchmarks/rounding.py FOLDER DATA [FOLDER DATA ...] [--save FILE]

Each FOLDER is one that `memlaw write` made of the records in DATA. Every target token's margin (its
logit less the highest of the others') is computed in whole sequences and token by token with a
cache; in batches of 64 and 7 and one by one; by length, in the file's order, shuffled; padded on
the right and on the left. Two of these ways, as an audit has them, foretell how many records each
of the other six says otherwise. Printed are that, and what was found.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kurtosis
from truth import folders_given

from memlaw.core.observer import Observer
from memlaw.data.record import Example
from memlaw.measure.examine import _measure_tokens, _token_measures, audit_examples
from memlaw.measure.session import Session
from memlaw.model.body import cache_in, cache_name
from memlaw.model.forward import collate, in_batches, target_logits
from memlaw.settings.audit import AuditConfig


@torch.inference_mode()
def whole(model: Any, examples: Sequence[Example], batches: list[list[int]], left: bool) -> Any:
    """Margins [N] of all target tokens, each record's in one pass."""
    found: dict[int, np.ndarray] = {}
    for rows in batches:
        batch = collate([examples[i] for i in rows], torch.device("cpu"), pad_left=left)
        margins = _margins(target_logits(model, batch), batch.target_ids)
        ends = np.cumsum([len(examples[i].target_ids) for i in rows])[:-1]
        found |= dict(zip(rows, np.split(margins, ends), strict=True))
    return np.concatenate([found[i] for i in range(len(examples))])


@torch.inference_mode()
def by_token(model: Any, examples: Sequence[Example], batches: list[list[int]]) -> Any:
    """The same, the right tokens given one by one, behind prompts padded on the left."""
    found: dict[int, list[float]] = {i: [] for i in range(len(examples))}
    for rows in batches:
        prompts = [examples[i].prompt_ids for i in rows]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        cache = None
        for at in range(max(len(examples[i].target_ids) for i in rows)):
            places = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = model(
                input_ids=ids,
                attention_mask=seen,
                position_ids=places,
                **{cache_name(model): cache},
                use_cache=True,
            )
            cache = cache_in(out)
            right = [examples[i].target_ids for i in rows]
            ids = torch.tensor([[t[at] if at < len(t) else 0] for t in right])
            margins = _margins(out.logits[:, -1], ids[:, 0])
            for i, target, margin in zip(rows, right, margins.tolist(), strict=True):
                if at < len(target):
                    found[i].append(margin)
            seen = torch.cat([seen, torch.ones(len(rows), 1, dtype=seen.dtype)], dim=1)
    return np.concatenate([np.array(found[i], np.float32) for i in range(len(examples))])


def _margins(logits: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    return np.asarray(_token_measures(logits, targets)[2].cpu().numpy())


def measured(folder: Path, data: Path) -> dict[str, Any]:
    """What two ways foretell of a folder, and what six others find."""
    session = Session(AuditConfig(adapter=folder), Observer())
    examples = session.examples(data)
    n = len(examples)
    in_order = list(range(n))
    by_length = sorted(
        in_order, key=lambda i: len(examples[i].prompt_ids) + len(examples[i].target_ids)
    )
    mixed = np.random.default_rng(0).permutation(n).tolist()
    batches = {
        (order, most): in_batches(examples, rows, most=most)
        for order, rows in (("length", by_length), ("file", in_order), ("mixed", mixed))
        for most in (64, 7, 1)
    }
    with session.model() as model:
        read = _measure_tokens(model, examples, 64, lambda *_: None, False)
        others = [
            by_token(model, examples, batches["length", 64]),
            by_token(model, examples, batches["file", 7]),
            whole(model, examples, batches["file", 64], False),
            whole(model, examples, batches["mixed", 64], False),
            whole(model, examples, batches["file", 64], True),
            whole(model, examples, batches["file", 1], False),
        ]
        second = by_token(model, examples, batches["file", 64])
        audit = audit_examples(model, session.base.tokenizer, examples)
    tokens = dataclasses.replace(read, decoded_margin_nats=second)
    risks = np.log1p(-tokens.flip_risk)
    foretold = -np.expm1(np.add.reduceat(risks, tokens.starts[:-1])).sum()
    wrong = [np.minimum.reduceat(way, tokens.starts[:-1]) < 0 for way in others]
    return {
        "folder": folder.name,
        "records": n,
        "sd_nats": round(float(tokens.rounding_nats or 0.0), 3),
        "excess_kurtosis": round(float(kurtosis(second - read.margin_nats)), 2),
        "foretold": round(float(foretold), 3),
        "found": [int(way.sum()) for way in wrong],
        "audit": (audit.rounding() or {})
        | {"certified": audit.n_certified, "to_be_surer": len(audit.unsure)},
    }


def main() -> None:
    """See the module."""
    given = folders_given(argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]))
    for folder, data in given.what:
        row = measured(folder, data)
        print(json.dumps(row), flush=True)
        if given.save:
            with given.save.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
