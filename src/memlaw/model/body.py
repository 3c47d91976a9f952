"""The body of a language model, which is all but its head; and what it goes on from."""

from __future__ import annotations

import inspect
from typing import Any

from memlaw.core.errors import ModelError

_CACHE, _CACHE_ONCE = "cache", "past_key_values"  # since Transformers 5.24; and before


def body_name(model: Any) -> str:
    """The attribute of a Transformers causal language model that holds its body.

    Raises:
        ModelError: it has none: no child module reads tokens.
    """
    name = str(model.base_model_prefix)
    if name and hasattr(model, name):
        return name
    reads = model.get_input_embeddings()  # some classes name another attribute than they have
    for name, child in model.named_children():
        if any(module is reads for module in child.modules()):
            return name
    raise ModelError(
        f"{type(model).__name__} has no body apart from its head. Name a causal language model."
    )


def body_of(model: Any) -> Any:
    """The module that gives a model's final hidden states [B, S, D] as `last_hidden_state`.

    Raises:
        ModelError: as `body_name`.
    """
    return getattr(model, body_name(model))


def cache_name(model: Any) -> str:
    """The argument of a causal language model's forward pass that takes a key-value cache."""
    return _CACHE if _CACHE in inspect.signature(model.forward).parameters else _CACHE_ONCE


def cache_in(held: Any) -> Any:
    """The key-value cache in a dict of a forward pass's arguments, or in what it returned.

    None where there is none: some models keep their state elsewhere.
    """
    for name in (_CACHE, _CACHE_ONCE):
        # Outputs are dicts whose own get() warns of the older name.
        found = dict.get(held, name) if isinstance(held, dict) else getattr(held, name, None)
        if found is not None:
            return found
    return None
