"""What a probe measures of a cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from memlaw.core.intervals import mean_interval
from memlaw.core.observer import EpochStats
from memlaw.data.record import Example, Record
from memlaw.measure.examine import Audit
from memlaw.model.adapter import Adapter
from memlaw.train.engine import Engine, Job

_CURVE_POINTS = 100
_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5)
_SATURATED = 0.05  # of the base model's loss


def measures(before: Audit, audit: Audit, n_parameters: int, n_steps: int) -> dict[str, Any]:
    """What one cell remembers; see `ProbeResult`."""
    tokens = audit.tokens
    bits = before.total_nll_bits - audit.total_nll_bits
    prefixes = [
        1.0 if record.first_failure is None else record.first_failure / record.n_tokens
        for record in audit.records
    ]
    p = np.quantile(tokens.p.astype(np.float64), _QUANTILES).tolist()
    return {
        "n_records": len(audit.records),
        "n_tokens": len(tokens.p),
        "n_parameters": n_parameters,
        "base_nll": before.nll_nats,
        "nll": audit.nll_nats,
        "delta_nll": before.nll_nats - audit.nll_nats,
        "saturated": audit.nll_nats < _SATURATED * before.nll_nats,
        "token_accuracy": float(tokens.correct.mean()),
        "share_under": float((tokens.p < audit.criterion.line).mean()),
        "min_p": p[0],
        "p_01": p[1],
        "p_05": p[2],
        "p_25": p[3],
        "p_50": p[4],
        "recall": audit.n_recalled / len(audit.records),
        "verbatim_prefix": sum(prefixes) / len(prefixes),
        "share_certified": sum(r.passed for r in audit.records) / len(audit.records),
        "certified": audit.passed,
        "n_steps": n_steps,
        "bits_stored": bits,
        "bits_per_parameter": bits / n_parameters,
    }


def thinned(curve: Sequence[EpochStats]) -> list[dict[str, Any]]:
    """At most a hundred epochs of a curve, the last one among them."""
    step = max(1, math.ceil(len(curve) / _CURVE_POINTS))
    kept = [stats for i, stats in enumerate(curve) if (len(curve) - 1 - i) % step == 0]
    names = ("epoch", "n_steps", "nll_nats", "n_under", "n_records_over", "n_relapses", "flop")
    return [{name: getattr(stats, name) for name in names} for stats in kept]


class UnseenDamage:
    """Damage of many adapters on the same text, run by an engine that may cache.

    Args:
        engine: its examples are windows of the text, see `window_examples`.
        bare: an adapter that changes nothing.
    """

    def __init__(self, engine: Engine, bare: Adapter) -> None:
        self.engine = engine
        self.before = _window_nll(engine, bare)  # [W] float64 nats per token

    def of(self, adapter: Adapter) -> dict[str, float]:
        """Rise of the loss in nats per token, and its 95 % interval."""
        delta = (_window_nll(self.engine, adapter) - self.before).tolist()
        low, high = mean_interval(delta)
        return {"damage_nll": sum(delta) / len(delta), "damage_low": low, "damage_high": high}


def window_examples(windows: torch.Tensor) -> list[Example]:
    """Windows of a text [W, S] as examples: the first token given, the others to be predicted."""
    return [
        Example(
            record=Record(prompt="unseen", completion="text", id=f"window {n}"),
            prompt_ids=(row[0],),
            target_ids=tuple(row[1:]),
        )
        for n, row in enumerate(windows.tolist())
    ]


@torch.no_grad()
def _window_nll(engine: Engine, adapter: Adapter) -> torch.Tensor:
    """[W] float64 nats a token: mean loss of each of the engine's examples."""
    lengths = [len(example.target_ids) for example in engine.examples]
    losses = engine.forward([Job(adapter, list(range(len(lengths))), dense=False)]).nll
    return torch.stack([part.double().mean() for part in losses.split(lengths)]).cpu()
