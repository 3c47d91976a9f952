"""The body of a language model: all but its head."""

from __future__ import annotations

from typing import Any

from memlaw.core.errors import ModelError


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
