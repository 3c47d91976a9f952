"""All that the next epoch of a learner depends on, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from memlaw.train.learner import Learner


def state_of(learner: Learner) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and JSON-able values. Both are copies."""
    holding = learner.holding
    weights = holding.in_training(learner.adapter) if holding else learner.adapter.state_dict()
    tensors = {f"adapter.{k}": v for k, v in weights.items()}
    tensors |= {f"moments.{k}": v for k, v in learner.solver.state().items()}
    tensors["seen_p"] = learner.seen.p
    values = {
        "epoch": learner.epoch,
        "n_steps": learner.n_steps,
        "n_looks": learner.n_looks,
        "weighted_share": learner.weighted_share,
        "over_at_start": learner.seen.over_at_start,
        "rank": learner.adapter.rank,
        "goal_p": learner.goal_p,
        "line_p": learner.seen.line_p,
        "rate_share": learner.schedule.share,
        "retention": learner.retention.weight,
        "objective_state": dict(learner.objective.state),
        "rows": learner.rows.tolist(),
    }
    if holding:
        held, values["holding"] = holding.state()
        tensors |= {f"holding.{k}": v for k, v in held.items()}
    return {k: v.detach().clone() for k, v in tensors.items()}, values


def restore(learner: Learner, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Bring a learner to a state that `state_of` gave."""
    if values["rank"] != learner.adapter.rank:
        learner.adapter = learner.adapter.fresh(values["rank"])
    learner.adapter.load_state_dict(_under(tensors, "adapter."))
    learner.solver = learner.new_solver()
    learner.solver.restore(_under(tensors, "moments."))
    here = learner.rows.tolist()
    if (rows := values.get("rows", here)) != here:  # older checkpoints don't name them
        learner.train_on(rows)
    learner.epoch, learner.n_steps = values["epoch"], values["n_steps"]
    learner.n_looks, learner.weighted_share = values["n_looks"], values["weighted_share"]
    learner.retention.weight, learner.schedule.share = values["retention"], values["rate_share"]
    learner.seen.line_p, learner.seen.over_at_start = values["line_p"], values["over_at_start"]
    learner.seen.p, learner._admitted = tensors["seen_p"].clone(), None
    learner.goal_p, learner.objective.state = values["goal_p"], values["objective_state"]
    if learner.holding:
        held = _under(tensors, "holding.")
        learner.holding.restore(held, values["holding"], learner.device)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name begins so, without that beginning."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
