"""Run the lower decoder layers apart from the upper ones.

An adapter changes nothing below its lowest module, so that what the base model's layers give there
serves every adapter: it is computed once, in float32 where it has to last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
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


@contextmanager
def in_float32(model: Any, n_layers: int) -> Iterator[None]:
    """A context in which a 16-bit model's embedding and lowest layers compute in float32.

    What they give is rounded once, for the layers above, and not after each operation. Weights are
    widened while their layer runs: no more than one is held in float32 at a time.

    Args:
        model: a Transformers causal language model; its weights are as before after the context.
        n_layers: so many layers, from the lowest on.
    """
    widened: list[tuple[Tensor, Tensor]] = []  # what belongs to the running layer, and its data

    def widen(module: nn.Module, args: Any, kwargs: Any) -> Any:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.dtype == model.dtype:
                widened.append((tensor, tensor.data))
                tensor.data = tensor.data.float()
        return _cast((args, kwargs), torch.float32)

    def restore() -> None:
        while widened:
            tensor, data = widened.pop()
            tensor.data = data

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        restore()
        return _cast(output, model.dtype) if module is highest else output

    def narrow(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _cast((args, kwargs), model.dtype)

    layers = list(decoder_layers(model)[1])
    highest = layers[n_layers - 1] if n_layers else None
    hooks = [
        model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.float()),
        *(at.register_forward_pre_hook(widen, with_kwargs=True) for at in layers[:n_layers]),
        *(at.register_forward_hook(leave) for at in layers[:n_layers]),
        *(at.register_forward_pre_hook(narrow, with_kwargs=True) for at in layers[n_layers:]),
    ]
    try:
        yield
    finally:
        restore()
        for hook in hooks:
            hook.remove()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with each floating tensor in it in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(part, dtype) for part in value)
    if type(value) is dict:
        return {name: _cast(part, dtype) for name, part in value.items()}
    return value
