"""What an update of an adapter keeps as it was: the records that are written, without reading them.

The change of an adapter is itself a LoRA, `A B − A₀ B₀ = [A, A₀] [B; −B₀]`, so that what it does to
the written records is told by the quadratic form of retention with what the sites read on *them*:
it costs the same for ten records as for ten thousand; and with the gradients of the log-odds of
*their* tokens: what moves general text's predictions isn't what moves a digit's. Which of them slip
all the same, a look tells.

What moves least is what stands still: where little changes, the columns that were written are left
alone, and others beside them learn it, and the changes after it. Where the rank leaves no room for
those, it is made by narrowing what was written, as far as it doesn't show.

Shapes: D_in and D_out widths of a site, R rank of the adapter, R₀ the one it started with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from memlaw.model.adapter import Adapter
from memlaw.model.forward import in_batches
from memlaw.model.head import log_odds
from memlaw.train.engine import Engine, Job
from memlaw.train.retention import Term, quadratic_penalty

_MOST_TOKENS = 1024  # whose log-odds are looked at, about
_HEAD_ROWS = 256  # of logits at a time
_PATIENT = 3  # times that the hold gives way before all is trained
CALM = 0.2  # of the learning rate, where little changes and all is trained
HELD = 0.3  # with specificity, and where new columns alone are trained, too


class Keeping:
    """The penalty on how far an adapter moves from where it started, as written records see it.

    Args:
        adapter: as it starts.
        terms: of the written records, in the coordinates that A is trained in.
        weight: what half the mean square that their log-odds move counts, beside the step's mean
            loss.
        still: so many of its first columns of A, and rows of B, aren't trained.
        beside, calm: what the learning rate is multiplied by where new columns are trained beside
            those, and where all are.

    Attributes:
        terms: as given; `weight`, `still` likewise, until they give way.
        least_under: tokens under the line, of what is trained, so far.
        progress_at: the epoch in which there were so few first, or the hold was loosened last.
    """

    def __init__(
        self,
        adapter: Adapter,
        terms: Sequence[Term],
        weight: float,
        still: int,
        *,
        beside: float = 1.0,
        calm: float = 1.0,
    ) -> None:
        self.terms, self.weight, self.still = terms, weight, still
        self.beside, self.calm = beside, calm
        self.n_given = self.progress_at = 0
        self.least_under = math.inf
        self.start = [
            (a.detach().clone(), b.detach().clone())
            for a, b in zip(adapter.a, adapter.b, strict=True)
        ]

    @property
    def rate(self) -> float:
        """What the learning rate is multiplied by.

        Less where what is written is trained, too: AdamW's steps are about as large for a number
        that hardly matters as for one that does, so that who slipped and is trained again makes
        others slip in turn. And less with specificity: the change has few records, so an epoch is a
        step or two, and the first of them, at the full rate, throw far what nothing has damped yet.
        """
        return self.beside if self.still else self.calm

    def loss(self, adapter: Adapter) -> Float32[Tensor, ""]:
        """The weighted penalty of a step; a scalar with a graph."""
        n = self.still
        change = [
            (torch.cat([a[:, n:], a0[:, n:]], dim=1), torch.cat([b[n:], -b0[n:]]))
            for a, b, (a0, b0) in zip(adapter.a, adapter.b, self.start, strict=True)
        ]
        return self.weight * quadratic_penalty(self.terms, change)

    def hold_still(self, adapter: Adapter) -> None:
        """Take the gradients of what isn't trained away."""
        for a, b in zip(adapter.a, adapter.b, strict=True):
            for part in (a.grad[:, : self.still], b.grad[: self.still]):
                part.zero_()

    def give_way(self) -> None:
        """Hold less tightly: half the weight; from the third time on everything is trained."""
        self.weight /= 2
        self.n_given += 1
        if self.n_given >= _PATIENT:
            self.still = 0


def odds_gradients(
    engine: Engine, adapter: Adapter, rows: Sequence[int], *, seed: int
) -> list[Float32[Tensor, "n _"]]:
    """What moves the log-odds of some records' target tokens, at each site's output: [n, D_out].

    At the same n positions for all sites, so scaled that the Gram is a mean. The gradients are of
    sums of log-odds with random signs: so it counts, on the mean, what a position does to later
    tokens, too.

    Args:
        engine: has the records among its examples.
        adapter: as it is; no gradient is left in it.
        rows: the records; so many of them are looked at, drawn from all, that they have about 1,024
            target tokens, and at least one.
        seed: of what is drawn.
    """
    modules = [site.module for site in adapter.sites]
    plain = adapter.folded().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = []
    n_tokens = 0
    for place in torch.randperm(len(rows), generator=generator).tolist():
        if n_tokens < _MOST_TOKENS:
            chosen.append(rows[place])
            n_tokens += len(engine.examples[rows[place]].target_ids)
    found: list[list[Tensor]] = [[] for _ in modules]
    for part in in_batches(engine.examples, sorted(chosen)):
        hidden, _, probes = engine.probed(Job(plain, part), modules)
        targets = torch.tensor([t for row in part for t in engine.examples[row].target_ids])
        leaf = hidden.detach().requires_grad_()
        for h, target in zip(leaf.split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True):
            signs = torch.randint(0, 2, (len(h),), generator=generator) * 2.0 - 1
            odds = log_odds(engine.head(h), target.to(h.device))
            (signs.to(h.device) * odds).sum().backward()
        hidden.backward(leaf.grad)
        for of_site, parts in zip(found, probes, strict=True):
            of_site.append(torch.cat([probe.grad for probe in parts]))  # type: ignore[misc]
    return [torch.cat(parts) / sum(map(len, parts)) ** 0.5 for parts in found]


@torch.no_grad()
def narrowed(adapter: Adapter, terms: Sequence[Term], rank: int) -> Adapter:
    """The adapter of a lower rank that does most nearly the same where the terms' positions are.

    All outputs count alike: what written records' log-odds don't see, other text does.

    Args:
        adapter: trained.
        terms: of all its sites, in the coordinates that A is trained in.
        rank: 1 to under its own.
    """
    narrow = adapter.fresh(rank)
    for term in terms:
        for site, reads in zip(term.sites, term.reads, strict=True):
            a, b = adapter.a[site].double(), adapter.b[site].double()
            read, write = _root(reads.double() @ a), _root(b.T)
            left, values, right = torch.linalg.svd(read @ write.T)
            roots = values[:rank].sqrt()
            narrow.a[site].copy_(a @ torch.linalg.pinv(read) @ (left[:, :rank] * roots))
            narrow.b[site].copy_((roots[:, None] * right[:rank]) @ torch.linalg.pinv(write).T @ b)
    return narrow


def _root(x: Float[Tensor, "n R"]) -> Float[Tensor, "R R"]:
    """What has the same Gram."""
    n, r = x.shape
    return torch.linalg.qr(torch.nn.functional.pad(x, (0, 0, 0, max(0, r - n)))).R
