"""Progress: what everything that takes long tells whoever is watching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class EpochStats:
    """What one epoch saw, each record just before the step it took part in.

    Attributes:
        epoch: epochs done, from 1.
        nll_nats: mean negative log-likelihood of all target tokens.
        n_under: target tokens with p < threshold + margin, or what the line was raised to after
            an audit that failed.
        n_records_over: records with no such token.
        n_relapses: tokens under the line that were over it when they were last seen.
        n_left_out: records that the objective left out, so far from complete that others come
            first.
        n_steps: optimiser steps done so far, skipped ones not counted.
        rank: the adapter's.
        retention: the weight of the penalty that was trained with.
        n_tokens_run: tokens sent through the model, prompts included, for all the adapters that
            are trained together.
        flop: floating-point operations in matrix products that this adapter took, forwards and
            backwards, its share of prompts that are run once for several among them; without
            retention's and whitening's.
        wall_s: seconds the epoch took.
    """

    epoch: int
    nll_nats: float
    n_under: int
    n_records_over: int
    n_relapses: int
    n_left_out: int
    n_steps: int
    rank: int
    retention: float
    n_tokens_run: int
    flop: float
    wall_s: float


class Spec(NamedTuple):
    """Which cell of a probe's grid.

    Attributes:
        length: target tokens.
        rank: of the adapter.
        seed: of data, initialisation and order.
    """

    length: int
    rank: int
    seed: int


class Observer:
    """Is told how a run goes. Does nothing; override what you want to know."""

    def notice(self, text: str) -> None:
        """A sentence for the user."""

    def progress(self, what: str, done: int, total: int) -> None:
        """A phase of an audit has done `done` of its `total` records."""

    def epoch(self, stats: EpochStats, n_records: int, max_epochs: int) -> None:
        """`write` has finished an epoch."""

    def grid(self, config: Any, finished: Sequence[Mapping[str, Any]], n_cells: int) -> None:
        """A probe starts: `finished` (rows of `read_cells`) of its `n_cells` cells have a result.

        `config` is the probe's `ProbeConfig`.
        """

    def steps(self, specs: Sequence[Spec], step: int, steps: int, nll_nats: float) -> None:
        """Cells that are trained together have done `step` of `steps` optimiser steps."""

    def cell(self, spec: Spec, status: str, result: Mapping[str, Any]) -> None:
        """A probe's cell is in the store."""
