"""LoRA adapters around frozen modules: what they compute.

Shapes: D_in, D_out widths of the adapted module; R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from memlaw.core.errors import AdapterError, ConfigError
from memlaw.model.sites import Site

Tensor = torch.Tensor


class Whitener(Protocol):
    """A fixed linear map of a site's input space."""

    def apply(self, columns: Tensor) -> Tensor:
        """The map times [D_in, R]."""
        ...


class Adapter(nn.Module):
    """A LoRA adapter on one or more sites of a frozen model.

    While attached, an adapted module f returns `f(x) + (x A) B`. A starts Kaiming-uniform
    (a = √5, that is U(±1/√D_in)), B starts at zero, the scale is 1. Weights are float32 whatever
    the model's dtype; the sum is formed in float32 and cast back, as PEFT does.

    With whiteners, A = W A′ and A′ is what is initialised and trained; `folded` gives the plain
    adapter that computes the same.

    With dropout, and once `begin_step` was called, what is added is dropped elementwise (the
    published probe does so in training). A folded adapter drops nothing.

    Args:
        sites: where.
        rank: R ≥ 1, at most the width of the narrowest site.
        seed: of A's initialisation, and of what is dropped.
        whiteners: one a site, or none at all.
        dropout: share of `(x A) B` that is dropped, in [0, 1).

    Raises:
        ConfigError: the rank is out of range.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        rank: int,
        seed: int,
        whiteners: Sequence[Whitener] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        limit = min(min(site.d_in, site.d_out) for site in sites)
        if not 1 <= rank <= limit:
            raise ConfigError(f"rank {rank} is out of range: 1 to {limit} for this placement.")
        self.sites = tuple(sites)
        self.seed = seed
        self.whiteners = tuple(whiteners)
        self.dropout = dropout
        self.draws: torch.Generator | None = None
        generator = torch.Generator().manual_seed(seed)
        self.a = nn.ParameterList(_kaiming(site.d_in, rank, generator) for site in sites)
        self.b = nn.ParameterList(torch.zeros(rank, site.d_out) for site in sites)

    @property
    def rank(self) -> int:
        """R."""
        return self.a[0].shape[1]

    @property
    def n_parameters(self) -> int:
        """How many numbers are trained: R · Σ (D_in + D_out)."""
        return sum(p.numel() for p in self.parameters())

    @property
    def is_peft(self) -> bool:
        """Every site is a linear module, so that PEFT can load the adapter."""
        return all(site.is_linear for site in self.sites)

    def begin_step(self, number: int) -> None:
        """Draw anew what is dropped, as belongs to the step of that number."""
        if self.dropout:
            self.draws = torch.Generator().manual_seed(self.seed * 1_000_003 + number)

    def attached(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Within the `with` block, `model`, which is the block's value, has the adapter."""
        return attached(model, [(self, 0)])

    def delta(self, module: str, x: Tensor) -> Tensor | None:
        """What it adds to a module's output: `(x A) B` [..., D_out] float32; None if nothing."""
        for i, site in enumerate(self.sites):
            if site.module == module:
                delta = lora_delta(x, *self.factors(i))
                if self.draws is None:
                    return delta
                kept = torch.rand(delta.shape, generator=self.draws) >= self.dropout
                return delta * kept.to(delta.device) / (1 - self.dropout)
        return None

    def factors(self, index: int) -> tuple[Tensor, Tensor]:
        """A [D_in, R] and B [R, D_out] of a site, whitening applied."""
        a = self.a[index]
        return (self.whiteners[index].apply(a) if self.whiteners else a), self.b[index]

    def folded(self) -> Adapter:
        """A plain adapter, without whiteners, that computes the same function."""
        plain = Adapter(self.sites, rank=self.rank, seed=self.seed).to(self.a[0].device)
        with torch.no_grad():
            for i in range(len(self.sites)):
                a, b = self.factors(i)
                plain.a[i].copy_(a)
                plain.b[i].copy_(b)
        return plain

    def grown(self, rank: int) -> Adapter:
        """An adapter of a higher rank that computes the same function.

        The added columns of A are initialised anew, the added rows of B are zero.
        """
        bigger = Adapter(
            self.sites,
            rank=rank,
            seed=self.seed + rank,
            whiteners=self.whiteners,
            dropout=self.dropout,
        ).to(self.a[0].device)
        with torch.no_grad():
            for large, small in zip(bigger.a, self.a, strict=True):
                large[:, : self.rank] = small
            for large, small in zip(bigger.b, self.b, strict=True):
                large[: self.rank] = small
        bigger.seed = self.seed
        return bigger


def _kaiming(d_in: int, rank: int, generator: torch.Generator) -> Tensor:
    return (torch.rand(d_in, rank, generator=generator) * 2 - 1) / math.sqrt(d_in)


def lora_delta(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`(x A) B`: [..., D_in] of any dtype to [..., D_out] in float32."""
    return (x.float() @ a) @ b


@contextmanager
def attached(model: nn.Module, parts: Sequence[tuple[Adapter, int]]) -> Iterator[nn.Module]:
    """Within the `with` block, `model`, which is the block's value, has the adapters.

    Args:
        model: the model.
        parts: adapters, and how many tokens of the one sequence that is run each of them is for,
            in order. With a single adapter the number is not looked at: it is for everything.
    """
    modules = dict.fromkeys(site.module for adapter, _ in parts for site in adapter.sites)
    hooks = [
        model.get_submodule(name).register_forward_hook(_lora_hook(parts, name)) for name in modules
    ]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _lora_hook(parts: Sequence[tuple[Adapter, int]], name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not isinstance(output, torch.Tensor):
            raise AdapterError(
                f"{type(module).__name__} returns a {type(output).__name__}, not a tensor: it "
                "can't be adapted as a block. Adapt its linear modules instead."
            )
        return add_deltas(parts, name, inputs[0], output)

    return hook


def add_deltas(
    parts: Sequence[tuple[Adapter, int]], module: str, x: Tensor, output: Tensor
) -> Tensor:
    """A module's output with what the adapters add, in the output's dtype; parts as `attached`."""
    if len(parts) == 1:
        delta = parts[0][0].delta(module, x)
        return output if delta is None else (output.float() + delta).to(output.dtype)
    counts = [count for _, count in parts]
    pieces = zip(parts, x.split(counts, dim=-2), output.split(counts, dim=-2), strict=True)
    return torch.cat([add_deltas([part], module, i, o) for part, i, o in pieces], dim=-2)
