"""Run the upper decoder layers alone, where what the lower ones give is known.

An adapter changes nothing below its lowest module, so that what the base model's layers give there
serves every adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from memlaw.model.sites import decoder_layers


@contextmanager
def recorded(model: nn.Module, layer: int) -> Iterator[list[Tensor]]:
    """A context in which each forward pass adds what goes into a decoder layer to a list.

    Args:
        model: a Transformers causal language model.
        layer: the layer's index, from 1.

    Yields:
        The list, of [B, S, D] for each pass, in the model's dtype. It stays empty where layers give
        anything but a tensor: such a model can't be replayed.
    """
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found.append(output)

    hook = decoder_layers(model)[1][layer - 1].register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


@contextmanager
def replayed(model: nn.Module, layer: int, known: Tensor) -> Iterator[None]:
    """A context in which the layers below `layer` compute nothing: it gets `known`.

    For the passes that `known` was recorded in: the same tokens, and the same mask.

    Args:
        model: the model; adapters in the layers from `layer` on may be attached to it.
        layer: the layer's index, from 1.
        known: [B, S, D], as recorded.
    """
    lower = list(decoder_layers(model)[1][:layer])

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return known

    for module in lower:
        module.forward = forward
    try:
        yield
    finally:
        for module in lower:
            del module.forward
