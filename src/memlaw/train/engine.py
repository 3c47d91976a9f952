"""The reference way to run a step: the whole model, nothing clever.

Shapes: N target tokens of all jobs' records (flattened, job after job, record after record), M of
their held examples, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64

from memlaw.core.errors import MemlawError
from memlaw.data.record import Example
from memlaw.model.adapter import Adapter
from memlaw.model.body import body_of
from memlaw.model.forward import Batch, collate, head_is_apart, in_batches, logits_of
from memlaw.model.head import Losses
from memlaw.model.sites import Site
from memlaw.train.held import BaseStates, Probed, held_losses, probing, site_reads

Tensor = torch.Tensor
_AT_ONCE = 16  # examples that aren't trained


class EngineError(MemlawError):
    """An engine can't run this model."""


class Job(NamedTuple):
    """An adapter, and what it is run on.

    Attributes:
        adapter: the adapter.
        rows: of the examples: records.
        dense: every target token will have a weight on the way back. A hint: an engine may get
            ready for it, the numbers are the same.
        held: rows of the examples that are held to the bare model.
    """

    adapter: Adapter
    rows: list[int]
    dense: bool = True
    held: Sequence[int] = ()


@runtime_checkable
class Engine(Protocol):
    """Runs adapters on examples."""

    model: Any
    examples: Sequence[Example]
    n_tokens: int  # that have been sent through the model, forwards, so far
    base: BaseStates  # what the bare model computes on the held examples

    def head(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Logits of final hidden states, as `hidden` gives them."""
        ...

    def hidden(self, jobs: Sequence[Job]) -> tuple[Float[Tensor, "N_M D"], Int64[Tensor, "N_M"]]:
        """Final hidden states before the targets, with a graph, and the targets.

        Job after job, and in each the records, then the held examples.
        """
        ...

    def forward(self, jobs: Sequence[Job]) -> Losses:
        """Losses of each job's records, and the KL of what it holds, under that job's adapter."""
        ...

    def probed(self, job: Job, modules: Sequence[str]) -> Probed:
        """Run a job's records with probes at modules' outputs, before the targets.

        Args:
            job: an adapter whose weights need no gradient, and rows.
            modules: of sites, by name.
        """
        ...

    def reads(self, rows: Sequence[int]) -> Float32[Tensor, "n D_in"] | None:
        """What the only site reads on some examples, whatever its adapter; None: it isn't known.

        So scaled that its Gram is a mean over all their tokens; n may be less than those.

        Args:
            rows: at least one.
        """
        ...

    def head_rows(self, n_targets: int, n_weighted: int, *, dense: bool) -> tuple[int, int]:
        """Through how many rows of logits a job's step goes, in `forward` and in `backward`.

        Those of held examples aside: they go there twice and back once, whatever the engine.

        Args:
            n_targets: target tokens of the job's records.
            n_weighted: those with a weight.
            dense: the job's hint.
        """
        ...


@torch.no_grad()
def target_losses(
    engine: Engine, adapter: Adapter, rows: Sequence[int]
) -> list[tuple[list[int], Float32[Tensor, "N"]]]:
    """The NLL of target tokens of an engine's examples, in nats, in parts: rows, and their tokens'.

    Args:
        engine: runs them.
        adapter: what they are run with.
        rows: of its examples.
    """
    return [
        (part, engine.forward([Job(adapter, part, False)]).nll)
        for part in in_batches(engine.examples, rows)
    ]


def bare_losses(
    engine: Engine, sites: Sequence[Site], n: int, device: torch.device
) -> Float32[Tensor, "N"]:
    """What the bare model loses on the target tokens of an engine's first n examples, in nats.

    Args:
        engine: runs them.
        sites: where an adapter that does nothing is put.
        n: the number of records.
        device: the model's.
    """
    nothing = Adapter(sites, rank=1, seed=0).to(device)
    return torch.cat([nll for _, nll in target_losses(engine, nothing, range(n))]).float().cpu()


def held_positions(
    examples: Sequence[Example], jobs: Sequence[Job], device: torch.device
) -> Bool[Tensor, "N_M"]:
    """Which of the positions that `Engine.hidden` gives are held ones."""
    lengths, is_held = [], []
    for job in jobs:
        lengths += [len(examples[row].target_ids) for row in (*job.rows, *job.held)]
        is_held += [False] * len(job.rows) + [True] * len(job.held)
    found = torch.tensor(is_held).repeat_interleave(torch.tensor(lengths))
    return found.to(device)


class PlainEngine:
    """Runs the whole model on whole records, one job after the other.

    Where logits don't follow from the body's final hidden states alone, they are taken for these
    (D = V), and the head does nothing.

    Args:
        model: frozen, in eval mode.
        examples: what there is to learn, and what is held.
        sites: the modules that adapters will sit on; needed where examples are held.
        held: rows of the held ones."""

    def __init__(
        self,
        model: Any,
        examples: Sequence[Example],
        *,
        sites: Sequence[Site] = (),
        held: Sequence[int] = (),
    ) -> None:
        self.model = model
        self.examples = examples
        self.device = next(model.parameters()).device
        self.n_tokens = 0
        self.head_is_apart = head_is_apart(model, examples[0])
        self.base = self._base_states(sites, held)

    def _base_states(self, sites: Sequence[Site], held: Sequence[int]) -> BaseStates:
        base = BaseStates(self.examples, held)
        for rows in (held[i : i + _AT_ONCE] for i in range(0, len(held), _AT_ONCE)):
            batch = collate([self.examples[row] for row in rows], self.device)
            with torch.no_grad(), site_reads(self.model, sites) as seen:
                hidden = self._run(batch)
            reads = [seen[site.module].reshape(*hidden.shape[:2], -1) for site in sites]
            for n, row in enumerate(rows):
                at = batch.keep[n]
                base.add(row, hidden[n, at], [read[n, at] for read in reads])
        return base

    def _run(self, batch: Batch) -> Tensor:
        """Final hidden states [B, S, D]."""
        if not self.head_is_apart:
            return self.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits
        states = body_of(self.model)(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
        return states.last_hidden_state

    def hidden(self, jobs: Sequence[Job]) -> tuple[Float[Tensor, "N_M D"], Int64[Tensor, "N_M"]]:
        """See `Engine.hidden`."""
        found, targets = [], []
        for job in jobs:
            batch = collate([self.examples[row] for row in (*job.rows, *job.held)], self.device)
            with job.adapter.attached(self.model):
                found.append(self._run(batch)[batch.keep])
            targets.append(batch.target_ids)
            self.n_tokens += batch.input_ids.numel()
        return torch.cat(found), torch.cat(targets)

    def head(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """See `Engine.head`."""
        return logits_of(self.model, hidden) if self.head_is_apart else hidden

    def forward(self, jobs: Sequence[Job]) -> Losses:
        """Losses of each job's records, and the KL of what it holds, under that job's adapter."""
        hidden, targets = self.hidden(jobs)
        is_held = held_positions(self.examples, jobs, self.device)

        def records(hidden: Tensor) -> Losses:
            logits = self.head(hidden).float()  # [N, V]
            target_ids = targets[~is_held]
            nll = F.cross_entropy(logits, target_ids, reduction="none")
            at_target = logits.detach().gather(1, target_ids[:, None])[:, 0]
            return Losses(
                nll=nll.detach(),
                correct=at_target == logits.detach().amax(dim=-1),
                kl=nll.new_zeros(0),
                backward=lambda weights, _=None: (weights * nll).sum().backward(),
            )

        if not any(job.held for job in jobs):
            return records(hidden)
        return held_losses(
            records,
            self.head,
            hidden,
            is_held,
            self.base.at([row for job in jobs for row in job.held]),
            max_rows=len(hidden),
        )

    def probed(self, job: Job, modules: Sequence[str]) -> Probed:
        """See `Engine.probed`."""
        parts = []
        for start in range(0, len(job.rows), _AT_ONCE):
            rows = job.rows[start : start + _AT_ONCE]
            batch = collate([self.examples[row] for row in rows], self.device)
            with (
                job.adapter.attached(self.model),
                probing(self.model, modules, batch.keep) as (reads, probes),
            ):
                parts.append((self._run(batch)[batch.keep], reads, probes))
        return Probed.joined(parts)

    def reads(self, rows: Sequence[int]) -> None:
        """See `Engine.reads`."""

    def head_rows(self, n_targets: int, n_weighted: int, *, dense: bool) -> tuple[int, int]:
        """All of them, forwards; and backwards, if any has a weight."""
        return n_targets, n_targets if n_weighted else 0
