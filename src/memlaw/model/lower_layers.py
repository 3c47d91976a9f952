"""Run the upper decoder layers alone, where what the lower ones give is known.

An adapter changes nothing below its lowest module, so that what the base model's layers give there
serves every adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from memlaw.model.sites import decoder_layers


@contextmanager
def recorded(model: nn.Module, layer: int) -> Iterator[list[Tensor]]:
    """A context in which each forward pass adds what goes into a decoder layer to a list.

    Args:
        model: a Transformers causal language model.
        layer: the layer's index; 0: nothing is below it, and the list stays empty.

    Yields:
        The list, of [B, S, D] for each pass, in the model's dtype. It stays empty where layers give
        anything but a tensor: such a model can't be replayed.
    """
    found: list[Tensor] = []
    if not layer:
        yield found
        return

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found.append(output)

    hook = decoder_layers(model)[1][layer - 1].register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


@contextmanager
def replayed(model: nn.Module, layer: int, known: Sequence[Tensor]) -> Iterator[None]:
    """A context in which the layers below `layer` compute nothing: it gets what is known.

    For the pass that it was recorded in: the same tokens, and the same mask.

    Args:
        model: the model; adapters in the layers from `layer` on may be attached to it.
        layer: the layer's index.
        known: as recorded in one pass, [B, S, D]; anything else than one, and all layers run.
    """
    if len(known) != 1:
        yield
        return
    (states,) = known
    lower = list(decoder_layers(model)[1][:layer])

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return states

    for module in lower:
        module.forward = forward
    try:
        yield
    finally:
        for module in lower:
            del module.forward
