"""Retention: what keeps an adapter from changing predictions where nothing is to be learnt.

A quadratic penalty on the adapter that approximates, in nats, how far it moves the model's
predictions. It is the Kronecker-factored Fisher of continual learning (Kirkpatrick et al. 2017,
Ritter et al. 2018) in closed form for a LoRA, so it costs no forward pass.

Shapes: D_in and D_out widths of a site, R rank, M rows of a factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float32
from torch import Tensor

from memlaw.core.errors import ConfigError
from memlaw.model.adapter import Adapter
from memlaw.train.precondition import GeneralMoments

_LEAST_TOKENS = 1000  # of the records, that retention is weighed against


@dataclass(frozen=True, kw_only=True)
class Term:
    """One quadratic form `½ ⟨Aᵀ S A, B G Bᵀ⟩`, A and B block-diagonal over some of the sites.

    Over several sites S and G have cross terms: what two of them change together counts together.

    Attributes:
        sites: indices of the adapter's sites.
        reads: for each of them [M, D_in], the same M positions: FᵀF, side by side, is S, the
            second moment of what the sites read.
        writes: for each of them [M', D_out], likewise: G, that of the gradient at their outputs.
        weight: of the form.
    """

    sites: Sequence[int]
    reads: Sequence[Float32[Tensor, "M _"]]
    writes: Sequence[Float32[Tensor, "M_out _"]]
    weight: float = 1.0

    def whitened(self, adapter: Adapter) -> Term:
        """The term of what A is trained on: `x W` instead of x, where there are whiteners."""
        if not adapter.whiteners:
            return self
        return replace(
            self,
            reads=[
                adapter.whiteners[site].apply(x.T).T.contiguous()
                for site, x in zip(self.sites, self.reads, strict=True)
            ],
        )

    def dropped_out(self, shrinkage: float, seed: int) -> Term:
        """The term with entries of what is read dropped out at random, and the others scaled up.

        In the mean S becomes `S + shrinkage · diag(S)`: what is known of how entries of `x` go
        together, by so many positions, counts for less (Wager et al. 2013 on dropout as a penalty;
        Ledoit and Wolf 2004 on shrinking a covariance).

        Args:
            shrinkage: ≥ 0; 0: the term as it is.
            seed: of what is dropped.
        """
        if not shrinkage:
            return self
        kept = 1 / (1 + shrinkage)
        generator = torch.Generator().manual_seed(seed)
        return replace(
            self,
            reads=[
                x * (torch.rand(x.shape, generator=generator) < kept).to(x.device) / kept
                for x in self.reads
            ],
        )

    def part(self, index: int, n: int) -> Term:
        """Of every n-th position, the one that part `index` begins with; as if these were all.

        Nothing is copied.
        """
        if min(len(x) for x in (*self.reads, *self.writes)) < n:
            return self
        reads, writes = ([x[index::n] for x in all] for all in (self.reads, self.writes))
        share = len(reads[0]) / len(self.reads[0]) * len(writes[0]) / len(self.writes[0])
        return replace(self, reads=reads, writes=writes, weight=self.weight / share)


def separate_terms(general: Sequence[GeneralMoments]) -> list[Term]:
    """A term for each site by itself, on general text."""
    return [Term(sites=[i], reads=[x], writes=[g]) for i, (x, g) in enumerate(general)]


def quadratic_penalty(
    terms: Sequence[Term], factors: Sequence[tuple[Tensor, Tensor]]
) -> Float32[Tensor, ""]:
    """About the KL divergence, in nats a position, that the adapter causes where terms come from.

    Args:
        terms: their weighted sum is returned.
        factors: of each of the adapter's sites, A [D_in, R] and B [R, D_out], in the coordinates
            that the terms are in.

    Returns:
        A scalar ≥ 0 that gradients flow through.
    """
    total = factors[0][0].new_zeros(())
    for term in terms:
        a, b = zip(*(factors[site] for site in term.sites), strict=True)
        # The thin factor first, and row by row: products that way, and the gradient's, which
        # autograd lays out alike, take a tenth of the time on a CPU.
        reads = torch.cat(
            [a.T.contiguous() @ x.T for x, a in zip(term.reads, a, strict=True)]
        )  # [R…, M]
        writes = torch.cat([b @ g.T for g, b in zip(term.writes, b, strict=True)])
        total = total + 0.5 * term.weight * ((reads @ reads.T) * (writes @ writes.T)).sum()
    return total


class Retention:
    """The penalty on what an adapter does to general text, and its weight.

    Args:
        weight: in tokens of general text; see `TrainConfig.retention`.
        terms: of general text; may be left out where the weight is 0.
        adapter: what is trained, or one with the same sites and whiteners.
        n_tokens: target tokens of the records.
        n_parts: the terms' positions are dealt to so many parts; each step looks at one of them.

    Raises:
        ConfigError: a weight without terms.
    """

    def __init__(
        self,
        weight: float,
        terms: Sequence[Term],
        adapter: Adapter,
        n_tokens: int,
        n_parts: int = 1,
    ) -> None:
        if weight and not terms:
            raise ConfigError("retention needs the statistics of the adapter's sites.")
        self.weight = weight
        self.terms = [term.whitened(adapter) for term in terms]
        self.parts = [self.terms]
        if n_parts > 1:
            self.parts = [[t.part(i, n_parts) for t in self.terms] for i in range(n_parts)]
        self.n_against = max(n_tokens, _LEAST_TOKENS)

    def penalty(self, adapter: Adapter) -> Float32[Tensor, ""]:
        """About the nats per token that general text pays, a scalar with a graph."""
        return _penalty(self.terms, adapter)

    def loss(self, adapter: Adapter, step: int) -> Float32[Tensor, ""]:
        """The weighted penalty of a step, to stand beside the records' mean loss."""
        part = self.parts[step % len(self.parts)]
        return self.weight / self.n_against * _penalty(part, adapter)


def _penalty(terms: Sequence[Term], adapter: Adapter) -> Float32[Tensor, ""]:
    if not terms:
        return torch.zeros((), device=adapter.a[0].device)
    return quadratic_penalty(terms, list(zip(adapter.a, adapter.b, strict=True)))
