"""LoRA adapters around frozen modules: what they compute.

    x [*batch, D_in] ─┬───────────► frozen module f ────────────► + ──► [*batch, D_out]
                      │                                           ▲
                      └─► A [D_in, R] ─► B [R, D_out] ─► dropout ─┘

The lower path is computed in float32, the sum is returned in f(x)'s dtype. Only training drops.
Where a site has a whitener W, A = W A′ and A′ is what is trained.

Shapes: D_in, D_out widths of the adapted module; R rank; *batch any leading dimensions, such as
records and tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from memlaw.core.errors import AdapterError, ConfigError
from memlaw.model.sites import Site


@runtime_checkable
class Whitener(Protocol):
    """A fixed linear map W of a site's input space, [D_in, D_in]."""

    def apply(self, columns: Float32[Tensor, "D_in R"]) -> Float32[Tensor, "D_in R"]:
        """W times the columns."""
        ...


class Adapter(nn.Module):
    """A LoRA adapter on one or more sites of a frozen model.

    While attached, an adapted module f returns `f(x) + (x A) B`. A is initialised Kaiming-uniform
    (a = √5, that is U(±1/√D_in)), B is initialised to zero, the scale is 1. Weights are float32
    whatever the model's dtype; the sum is computed in float32 and cast back, as PEFT does.

    With whiteners, A = W A′, and A′ is what is initialised and trained; `folded` gives the plain
    adapter that computes the same.

    With dropout, and once `begin_step` was called, elements of `(x A) B` are dropped, as in the
    training of the published probe. A folded adapter has no dropout.

    Args:
        sites: the modules to adapt; at least one.
        rank: R ≥ 1, at most the width of the narrowest site.
        seed: of A's initialisation, and of dropout.
        whiteners: one per site, or none at all.
        dropout: probability that an element of `(x A) B` is dropped, in [0, 1).

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
        """Number of trained parameters: R · Σ (D_in + D_out) over the sites."""
        return sum(p.numel() for p in self.parameters())

    @property
    def is_peft(self) -> bool:
        """Whether PEFT can load the adapter: every site is a linear module."""
        return all(site.is_linear for site in self.sites)

    def begin_step(self, number: int) -> None:
        """Set the random state of dropout to that of the training step of that number."""
        if self.dropout:
            self.draws = torch.Generator().manual_seed(self.seed * 1_000_003 + number)

    def attached(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """A context in which `model` has the adapter; its value is `model`."""
        return attached(model, [(self, 0)])

    def delta(
        self, module: str, x: Float[Tensor, "*batch D_in"]
    ) -> Float32[Tensor, "*batch D_out"] | None:
        """What it adds to a module's output: `(x A) B`; None if it isn't on that module."""
        for i, site in enumerate(self.sites):
            if site.module == module:
                delta = lora_delta(x, *self.factors(i))
                if self.draws is None:
                    return delta
                kept = torch.rand(delta.shape, generator=self.draws) >= self.dropout
                return delta * kept.to(delta.device) / (1 - self.dropout)
        return None

    def factors(self, index: int) -> tuple[Float32[Tensor, "D_in R"], Float32[Tensor, "R D_out"]]:
        """A and B of a site, whitening applied."""
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

        The added columns of A are initialised at random, the added rows of B are zero.
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


def _kaiming(d_in: int, rank: int, generator: torch.Generator) -> Float32[Tensor, "D_in R"]:
    return (torch.rand(d_in, rank, generator=generator) * 2 - 1) / math.sqrt(d_in)


def lora_delta(
    x: Float[Tensor, "*batch D_in"], a: Float32[Tensor, "D_in R"], b: Float32[Tensor, "R D_out"]
) -> Float32[Tensor, "*batch D_out"]:
    """`(x A) B`, computed in float32 whatever the dtype of x."""
    return (x.float() @ a) @ b


@contextmanager
def attached(
    model: nn.Module, parts: Sequence[tuple[Adapter, int]], *, but: Collection[str] = ()
) -> Iterator[nn.Module]:
    """A context in which `model` has the adapters; its value is `model`.

    Args:
        model: the model.
        parts: adapters, each with the number of tokens that it is applied to, in their order along
            the sequence. The number is ignored if there is one adapter: it is applied to all.
        but: names of modules that are left as they are.
    """
    modules = dict.fromkeys(site.module for adapter, _ in parts for site in adapter.sites)
    hooks = [
        model.get_submodule(name).register_forward_hook(_lora_hook(parts, name))
        for name in modules
        if name not in but
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
    parts: Sequence[tuple[Adapter, int]],
    module: str,
    x: Float[Tensor, "*batch D_in"],
    output: Float[Tensor, "*batch D_out"],
) -> Float[Tensor, "*batch D_out"]:
    """A module's output plus what the adapters add to it, in the output's dtype.

    Args:
        parts: as in `attached`.
        module: the module's qualified name.
        x: its input.
        output: its output.
    """
    if len(parts) == 1:
        delta = parts[0][0].delta(module, x)
        return output if delta is None else (output.float() + delta).to(output.dtype)
    counts = [count for _, count in parts]
    pieces = zip(parts, x.split(counts, dim=-2), output.split(counts, dim=-2), strict=True)
    return torch.cat([add_deltas([part], module, i, o) for part, i, o in pieces], dim=-2)
