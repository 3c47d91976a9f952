"""Examples that are held to the bare model: what it makes of them, and how far a step is from it.

Shapes: N target positions of a step, M of them held, D width, D_in widths of all sites together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memlaw.data.record import Example
from memlaw.model.divergence import divergence
from memlaw.model.head import Losses
from memlaw.model.sites import Site


class BaseStates:
    """What the bare model computes at the target positions of held examples.

    Args:
        examples: all.
        rows: the held ones.

    Attributes:
        reads: for each held example, in the order of `rows`, what all sites read, side by side
            [D_in], at the last position of its prompt.
    """

    def __init__(self, examples: Sequence[Example], rows: Sequence[int]) -> None:
        self.rows = list(rows)
        self.lengths = {row: len(examples[row].target_ids) for row in self.rows}
        self.hidden: dict[int, Tensor] = {}  # of each row [its target tokens, D]
        self._reads: dict[int, Tensor] = {}

    def add(
        self, row: int, hidden: Float[Tensor, "T D"], reads: Sequence[Float[Tensor, "T _"]]
    ) -> None:
        """Keep an example's final hidden states, and what each site read, where targets follow."""
        if row in self.lengths:
            self.hidden[row] = hidden.detach().clone()
            self._reads[row] = torch.cat([read[0] for read in reads]).detach()

    @property
    def reads(self) -> Float[Tensor, "rows D_in"]:
        """See the class."""
        return torch.stack([self._reads[row] for row in self.rows])

    def at(self, rows: Sequence[int]) -> Float[Tensor, "M D"]:
        """Final hidden states before the targets of some rows, one row after the other."""
        return torch.cat([self.hidden[row] for row in rows])


@contextmanager
def site_reads(model: Any, sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
    """Within the block, what each site read last, by its module's name."""
    seen: dict[str, Tensor] = {}

    def reader(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0].detach()

        return hook

    hooks = [
        model.get_submodule(site.module).register_forward_pre_hook(reader(site.module))
        for site in sites
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def probing(
    model: Any, modules: Sequence[str], at: Bool[Tensor, "_ _"]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Within the block, for a run of the model: what modules read at some positions, and probes.

    A probe is a zero that is added to the module's output there, [positions, D_out] float32, so
    that its gradient is that of the output.

    Args:
        model: what is run, once.
        modules: by name; what is given is in their order, whatever the order that they run in.
        at: which positions of the run's [B, S].
    """
    nothing = torch.empty(0)
    reads, probes = [nothing] * len(modules), [nothing] * len(modules)

    def probe_of(place: int) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            here = at.reshape(output.shape[:-1])  # some layers read [B * S, D]
            reads[place] = inputs[0][here].detach()
            probe = torch.zeros_like(output[here], dtype=torch.float32, requires_grad=True)
            probes[place] = probe
            probed = output.clone()
            probed[here] = (output[here].float() + probe).to(output.dtype)
            return probed

        return hook

    hooks = [
        model.get_submodule(name).register_forward_hook(probe_of(place))
        for place, name in enumerate(modules)
    ]
    try:
        yield reads, probes
    finally:
        for handle in hooks:
            handle.remove()


class Probed(NamedTuple):
    """A run of the model with probes at some of its modules' outputs.

    Attributes:
        hidden: final hidden states before the targets, with a graph from the probes.
        reads: what each module reads there.
        probes: of each module, for each part of the run; together as many rows as `hidden`.
    """

    hidden: Float[Tensor, "N D"]
    reads: list[Float[Tensor, "N _"]]
    probes: list[list[Float[Tensor, "_ _"]]]

    @classmethod
    def joined(cls, parts: Sequence[tuple[Tensor, list[Tensor], list[Tensor]]]) -> Probed:
        """Of the parts of a run."""
        hidden, reads, probes = zip(*parts, strict=True)
        return cls(
            hidden=torch.cat(hidden),
            reads=[torch.cat(of_module) for of_module in zip(*reads, strict=True)],
            probes=[list(of_module) for of_module in zip(*probes, strict=True)],
        )


def held_losses(
    records: Callable[[Tensor], Losses],
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "N D"],
    is_held: Bool[Tensor, "N"],
    base_hidden: Float[Tensor, "M D"],
    *,
    max_rows: int,
) -> Losses:
    """The losses of a step in which some positions are held to the bare model.

    Args:
        records: gives the losses of the other positions from their hidden states.
        head: maps hidden states [n, D] to logits [n, V], each row independently.
        hidden: final hidden states, part of an autograd graph.
        is_held: which of them are held.
        base_hidden: the bare model's there.
        max_rows: the most rows of logits in memory at a time.
    """
    leaf = hidden.detach().requires_grad_()
    losses = records(leaf[~is_held])
    kl, at_hidden = divergence(head, hidden.detach()[is_held], base_hidden, max_rows=max_rows)

    def backward(weights: Tensor, kl_weights: Tensor) -> None:
        losses.backward(weights)
        assert leaf.grad is not None
        leaf.grad[is_held] += (kl_weights[:, None] * at_hidden).to(leaf.dtype)
        hidden.backward(leaf.grad)

    return Losses(nll=losses.nll, correct=losses.correct, kl=kl, backward=backward)
