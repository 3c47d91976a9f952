"""LoRA adapters around frozen modules: what they compute.

    x [*batch, D_in] ─┬───────────► frozen module f ────────────► + ──► [*batch, D_out]
                      │                                           ▲
                      └─► A [D_in, R] ─► B [R, D_out] ─► dropout ─┘

The lower path is computed in float32, the sum is returned in f(x)'s dtype. Only training drops.
Where a site has a whitener W, A = W A′ and A′ is what is trained. An adapter with invocation tokens
computes the lower path at its active positions alone; the others are f's, bit for bit.

Shapes: D_in, D_out widths of the adapted module; R rank; *batch any leading dimensions, such as
records and tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn

from memlaw.core.errors import AdapterError, ConfigError
from memlaw.model.invocation import Invocation
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
        invocation_ids: token ids from whose last occurrence in an input on the adapter is active;
            none at all: always. See `memlaw.model.invocation`.

    Raises:
        ConfigError: the rank is out of range; or invocation tokens for a site that isn't linear,
            which PEFT has no form for.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        rank: int,
        seed: int,
        whiteners: Sequence[Whitener] = (),
        dropout: float = 0.0,
        invocation_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        limit = min(min(site.d_in, site.d_out) for site in sites)
        if not 1 <= rank <= limit:
            raise ConfigError(f"rank {rank} is out of range: 1 to {limit} for this placement.")
        if invocation_ids and not all(site.is_linear for site in sites):
            raise ConfigError(
                "an activated adapter sits on linear modules only. Place it on down_proj, attn, "
                "all-linear or names of linear modules."
            )
        self.sites = tuple(sites)
        self.seed = seed
        self.whiteners = tuple(whiteners)
        self.dropout = dropout
        self.invocation_ids = tuple(invocation_ids)
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
        plain = Adapter(
            self.sites, rank=self.rank, seed=self.seed, invocation_ids=self.invocation_ids
        ).to(self.a[0].device)
        with torch.no_grad():
            for i in range(len(self.sites)):
                a, b = self.factors(i)
                plain.a[i].copy_(a)
                plain.b[i].copy_(b)
        return plain

    def fresh(self, rank: int, *, seed: int | None = None) -> Adapter:
        """A new adapter like this one, of another rank; `seed`: of its initialisation."""
        return Adapter(
            self.sites,
            rank=rank,
            seed=self.seed if seed is None else seed,
            whiteners=self.whiteners,
            dropout=self.dropout,
            invocation_ids=self.invocation_ids,
        ).to(self.a[0].device)

    @torch.no_grad()
    def put(
        self, factors: Sequence[tuple[Float32[Tensor, "D_in R"], Float32[Tensor, "R D_out"]]]
    ) -> None:
        """Take over A and B of a plain adapter of the same rank: the inverse of `factors`."""
        for i, (a, b) in enumerate(factors):
            if self.whiteners:
                identity = torch.eye(len(a), device=a.device)
                whitener = self.whiteners[i].apply(identity).double()
                a = torch.linalg.solve(whitener.cpu(), a.double().cpu()).to(a)
            self.a[i].copy_(a)
            self.b[i].copy_(b)

    def grown(self, rank: int) -> Adapter:
        """An adapter of a higher rank that computes the same function.

        The added columns of A are initialised at random, the added rows of B are zero.
        """
        bigger = self.fresh(rank, seed=self.seed + rank)
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
    model: nn.Module,
    parts: Sequence[tuple[Adapter, int]],
    *,
    but: Collection[str] = (),
    active: Bool[Tensor, "*batch"] | None = None,
) -> Iterator[nn.Module]:
    """A context in which `model` has the adapters; its value is `model`.

    Args:
        model: the model.
        parts: adapters, each with the number of tokens that it is applied to, in their order along
            the sequence. The number is ignored if there is one adapter: it is applied to all.
        but: names of modules that are left as they are.
        active: where adapters with invocation tokens are active. None: it is looked for in each of
            the model's inputs; then all of the adapters must have the same tokens.
    """
    modules = dict.fromkeys(site.module for adapter, _ in parts for site in adapter.sites)
    with ExitStack() as stack:
        find: Callable[[], Tensor | None] = lambda: active  # noqa: E731
        if active is None and (ids := parts[0][0].invocation_ids):
            invocation = Invocation(ids)
            stack.enter_context(invocation.watching(model))
            find = invocation.mask
        for name in modules:
            if name not in but:
                hook = _lora_hook(parts, name, find)
                stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield model


def _lora_hook(
    parts: Sequence[tuple[Adapter, int]], name: str, find: Callable[[], Tensor | None]
) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not isinstance(output, torch.Tensor):
            raise AdapterError(
                f"{type(module).__name__} returns a {type(output).__name__}, not a tensor: it "
                "can't be adapted as a block. Adapt its linear modules instead."
            )
        return add_deltas(parts, name, inputs[0], output, find())

    return hook


def add_deltas(
    parts: Sequence[tuple[Adapter, int]],
    module: str,
    x: Float[Tensor, "*batch D_in"],
    output: Float[Tensor, "*batch D_out"],
    active: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch D_out"]:
    """A module's output plus what the adapters add to it, in the output's dtype.

    Args:
        parts: as in `attached`.
        module: the module's qualified name.
        x: its input.
        output: its output.
        active: where adapters with invocation tokens are active; None: everywhere.
    """
    if len(parts) > 1:
        counts = [count for _, count in parts]
        pieces = zip(
            parts,
            x.split(counts, dim=-2),
            output.split(counts, dim=-2),
            [None] * len(parts) if active is None else active.split(counts, dim=-1),
            strict=True,
        )
        added = [add_deltas([part], module, i, o, where) for part, i, o, where in pieces]
        return torch.cat(added, dim=-2)
    adapter = parts[0][0]
    if active is None or not adapter.invocation_ids:
        delta = adapter.delta(module, x)
        return output if delta is None else (output.float() + delta).to(output.dtype)
    delta = adapter.delta(module, x[active])  # [active positions, D_out]
    if delta is None:
        return output
    changed = output.clone()
    changed[active] = (output[active].float() + delta).to(output.dtype)
    return changed
