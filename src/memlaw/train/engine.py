"""The reference way to run a step: the whole model, nothing clever.

Shapes: N target tokens of all jobs (flattened, job after job, record after record), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from memlaw.core.errors import MemlawError
from memlaw.data.record import Example
from memlaw.model.adapter import Adapter
from memlaw.model.forward import collate, target_logits
from memlaw.model.head import Losses

Tensor = torch.Tensor


class EngineError(MemlawError):
    """An engine can't run this model."""


class Job(NamedTuple):
    """An adapter, and what it is run on.

    Attributes:
        adapter: the adapter.
        rows: of the examples.
        dense: every target token will have a weight on the way back. A hint: an engine may get
            ready for it, the numbers are the same.
    """

    adapter: Adapter
    rows: list[int]
    dense: bool = True


@runtime_checkable
class Engine(Protocol):
    """Runs adapters on examples."""

    model: Any
    examples: Sequence[Example]
    n_tokens: int  # that have been sent through the model, forwards, so far

    def forward(self, jobs: Sequence[Job]) -> Losses:
        """Losses of each job's records, under that job's adapter."""
        ...

    def head_rows(self, n_targets: int, n_weighted: int, *, dense: bool) -> tuple[int, int]:
        """Through how many rows of logits a job's step goes, in `forward` and in `backward`.

        Args:
            n_targets: target tokens of the job.
            n_weighted: those with a weight.
            dense: the job's hint.
        """
        ...


class PlainEngine:
    """Runs the whole model on whole records, one job after the other.

    Args:
        model: frozen, in eval mode.
        examples: what there is to learn.
    """

    def __init__(self, model: Any, examples: Sequence[Example]) -> None:
        self.model = model
        self.examples = examples
        self.device = next(model.parameters()).device
        self.n_tokens = 0

    def forward(self, jobs: Sequence[Job]) -> Losses:
        """Losses of each job's records, under that job's adapter."""
        nll, correct = [], []
        for adapter, rows, _ in jobs:
            batch = collate([self.examples[row] for row in rows], self.device)
            with adapter.attached(self.model):
                logits = target_logits(self.model, batch).float()  # [N of the job, V]
            nll.append(F.cross_entropy(logits, batch.target_ids, reduction="none"))
            at_target = logits.detach().gather(1, batch.target_ids[:, None])
            correct.append(at_target[:, 0] == logits.detach().amax(dim=-1))
            self.n_tokens += batch.input_ids.numel()
        all_nll = torch.cat(nll)
        return Losses(
            nll=all_nll.detach(),
            correct=torch.cat(correct),
            backward=lambda weights: (weights * all_nll).sum().backward(),
        )

    def head_rows(self, n_targets: int, n_weighted: int, *, dense: bool) -> tuple[int, int]:
        """All of them, forwards; and backwards, if any has a weight."""
        return n_targets, n_targets if n_weighted else 0
