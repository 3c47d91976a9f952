"""Mixtures of experts: blocks that flatten a batch before their linear modules read it.

Shapes: B rows, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def is_mixture(block: nn.Module) -> bool:
    """Whether a module chooses among experts."""
    return hasattr(block, "experts")


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds several experts' weights as one tensor [experts, …]."""
    return any(weight.dim() == 3 for weight in module._parameters.values() if weight is not None)


def read_unflattened(model: nn.Module) -> None:
    """Let the parts of shared experts read [B, S, D], also where their block gives them [B·S, D].

    What is computed stays the same; all that looks at a module's input can so go by position.
    """
    for block in model.modules():
        if is_mixture(block):
            shapes: list[tuple[int, ...]] = [()]
            flat: set[nn.Module] = set()  # that were given [B·S, D]
            block.register_forward_pre_hook(_remembering(shapes), with_kwargs=True)
            for shared in _shared(block):
                shared.register_forward_pre_hook(_unflattening(shapes, flat))
                shared.register_forward_hook(_flattening(flat))


def _shared(block: nn.Module) -> Iterator[nn.Module]:
    """The experts that all tokens go through: blocks of their own, with linear modules."""
    for name, child in block.named_children():
        if name != "experts" and any(isinstance(m, nn.Linear) for m in child.children()):
            yield child


def _remembering(shapes: list[tuple[int, ...]]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        shapes[0] = tuple((args[0] if args else kwargs["hidden_states"]).shape)

    return hook


def _unflattening(shapes: list[tuple[int, ...]], flat: set[nn.Module]) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        if args[0].dim() == len(shapes[0]):
            return None
        flat.add(module)
        return (args[0].view(shapes[0]), *args[1:])

    return hook


def _flattening(flat: set[nn.Module]) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Any:
        if module not in flat:
            return None
        flat.remove(module)
        return output.flatten(0, -2)

    return hook
