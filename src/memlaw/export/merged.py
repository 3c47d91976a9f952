"""The base model with the adapter in its weights, as Transformers loads it.

Shapes: a weight is [O, I], outputs by inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memlaw.core.errors import AdapterError
from memlaw.export.lora import LoraFactors
from memlaw.model.base import BaseModel


def write_merged(
    base: BaseModel, factors: Mapping[str, LoraFactors], folder: Path, dtype: torch.dtype
) -> None:
    """Write the merged model and its tokenizer.

    Args:
        base: loaded in float32, so that weights are rounded once, at the end; it is changed.
        factors: what each module changes by.
        folder: to write to; it exists.
        dtype: of the weights that are written.

    Raises:
        AdapterError: a module isn't there, or of another shape.
    """
    _put(base.model, merged_weights(base, factors))
    base.model.to(dtype).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def merged_weights(base: BaseModel, factors: Mapping[str, LoraFactors]) -> dict[str, Tensor]:
    """What each adapted module's weight is with the adapter in it: [O, I] float32, by name.

    Args:
        base: loaded in float32.
        factors: what each module changes by.

    Raises:
        AdapterError: as `write_merged`.
    """
    found = {}
    for name, own in factors.items():
        try:
            module = base.model.get_submodule(name)
            weight = _turned(module, module.weight.detach())
        except AttributeError as error:
            raise AdapterError(f"{base.spec} has no module {name} to merge into.") from error
        delta = own.delta.to(weight.device)
        if weight.shape != delta.shape:
            raise AdapterError(
                f"{name} of {base.spec} is {list(weight.shape)}, the adapter's "
                f"{list(delta.shape)}. Name the base model that it was trained on."
            )
        found[name] = weight + delta
    return found


@contextmanager
def with_weights(model: Any, weights: Mapping[str, Tensor]) -> Iterator[Any]:
    """Within the block modules of a model have other weights, [O, I], rounded to its dtype."""
    before = {name: _of(model, name).clone() for name in weights}
    _put(model, weights)
    try:
        yield model
    finally:
        _put(model, before)


def _put(model: Any, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, weight in weights.items():
            _of(model, name).copy_(weight)


def _of(model: Any, name: str) -> Tensor:
    module = model.get_submodule(name)
    return _turned(module, module.weight.detach())


def _turned(module: Any, weight: Tensor) -> Tensor:
    """A view as [O, I]: Transformers' Conv1D keeps its weight as [I, O]."""
    return weight.T if type(module).__name__ == "Conv1D" else weight
