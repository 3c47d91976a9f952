"""The cells that come with the package, and plans made from them, without a probe."""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Sequence
from typing import Any

from memlaw.law.estimator import LawError
from memlaw.law.plan import RankPlan, plan_rank

BUILTIN = (
    "built-in table: SmolLM2-135M-Instruct, down_proj of layer 20, 150 steps of the default recipe"
)
_ALIKE = math.log(1.3)  # ratio of losses up to which data count as alike


def builtin_cells() -> list[dict[str, Any]]:
    """The rows that come with this package; `BUILTIN` describes them."""
    file = importlib.resources.files("memlaw.law") / "builtin_cells.json"
    return json.loads(file.read_text(encoding="utf-8"))


def plan_by_builtin(
    base_sha256: str, sites: Sequence[str], n_tokens: int, base_nll: float
) -> RankPlan | None:
    """`plan_rank` from the built-in table, if that has cells of the same model, sites and loss.

    Args:
        base_sha256: hash of the base model's weights.
        sites: names of the adapted modules.
        n_tokens: target tokens to store.
        base_nll: the base model's mean loss on them, nats per token. The plan is made from the
            table's task whose mean loss is nearest in ratio.

    Returns:
        The plan; None if the table has no cells of this model and these sites, if the nearest
        task's loss differs by a factor of more than 1.3, or if the plan would extrapolate.
    """
    cells = [
        cell
        for cell in builtin_cells()
        if cell["base_sha256"] == base_sha256 and cell["sites"] == list(sites)
    ]
    if not base_nll > 0:
        return None
    losses: dict[str, list[float]] = {}
    for cell in cells:
        losses.setdefault(cell["task"], []).append(cell["base_nll"])
    apart = {
        task: abs(math.log(base_nll * len(found) / sum(found))) for task, found in losses.items()
    }
    task = min(apart, key=lambda task: apart[task], default=None)
    if task is None or apart[task] > _ALIKE:
        return None
    try:
        plan = plan_rank(cells, n_tokens, where={"task": task})
    except LawError:
        return None
    return None if plan.extrapolates else plan
