"""The base model with the adapter in its weights, as Transformers loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

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
    with torch.no_grad():
        for name, own in factors.items():
            try:
                weight = base.model.get_submodule(name).weight
            except AttributeError as error:
                raise AdapterError(f"{base.spec} has no module {name} to merge into.") from error
            delta = own.delta.to(weight.device)
            if type(base.model.get_submodule(name)).__name__ == "Conv1D":
                delta = delta.T  # Transformers' Conv1D keeps its weight as [I, O]
            if weight.shape != delta.shape:
                raise AdapterError(
                    f"{name} of {base.spec} is {list(weight.shape)}, the adapter's "
                    f"{list(delta.shape)}. Name the base model that it was trained on."
                )
            weight += delta
    base.model.to(dtype).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
