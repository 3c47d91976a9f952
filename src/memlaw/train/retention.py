"""Retention: what keeps an adapter from changing predictions on general text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float32
from torch import Tensor

from memlaw.core.errors import ConfigError
from memlaw.model.adapter import Adapter
from memlaw.train.precondition import Statistics, retention_penalty

_LEAST_TOKENS = 1000  # of the records, that retention is weighed against


class Retention:
    """The KL penalty on general text, in closed form, and its weight.

    Args:
        weight: in tokens of general text; see `TrainConfig.retention`.
        statistics: of the adapter's sites; may be left out where the weight is 0.
        adapter: what is trained, or one with the same sites and whiteners.
        n_tokens: target tokens of the records.

    Raises:
        ConfigError: a weight without statistics.
    """

    def __init__(
        self, weight: float, statistics: Sequence[Statistics], adapter: Adapter, n_tokens: int
    ) -> None:
        if weight and not statistics:
            raise ConfigError("retention needs the statistics of the adapter's sites.")
        self.weight = weight
        self.statistics = [_whitened(s, adapter, i) for i, s in enumerate(statistics)]
        self.n_against = max(n_tokens, _LEAST_TOKENS)

    def penalty(self, adapter: Adapter) -> Float32[Tensor, ""]:
        """About the nats per token that general text pays, a scalar with a graph."""
        if not self.statistics:
            return torch.zeros((), device=adapter.a[0].device)
        return retention_penalty(self.statistics, list(zip(adapter.a, adapter.b, strict=True)))

    def loss(self, adapter: Adapter) -> Float32[Tensor, ""]:
        """The weighted penalty, to stand beside the records' mean loss."""
        return self.weight / self.n_against * self.penalty(adapter)


def _whitened(statistics: Statistics, adapter: Adapter, site: int) -> Statistics:
    """The statistics of what A is trained on: `x W` instead of x, where there is a whitener."""
    if not adapter.whiteners:
        return statistics
    whitener = adapter.whiteners[site]
    return dataclasses.replace(
        statistics, general_in=whitener.apply(statistics.general_in.T).T.contiguous()
    )
