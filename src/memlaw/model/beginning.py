"""What all prompts of a batch begin with (a chat template, say), run once for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from memlaw.model.body import body_of

_LEAST_ALIKE = 8  # tokens: fewer are not worth a pass of their own


def begun_together(model: Any, prompts: Sequence[Sequence[int]]) -> Any:
    """The keys and values of what all prompts begin with, for each of them; None: there are none.

    Only of a model that is told positions, and that attends in each layer to all that came before:
    then it doesn't matter where pads stand. Nor may anything look at what the model is given: it
    would not see the prompt as one.

    Args:
        model: a Transformers causal language model, in eval mode; no gradients are recorded.
        prompts: token ids of B prompts, none of them empty.

    Returns:
        A cache of as many tokens as `n_alike` says, for B rows; a model that is run on it adds to
        it.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    n = n_alike(prompts)
    if len(prompts) < 2 or n < _LEAST_ALIKE or body_of(model)._forward_pre_hooks:
        return None
    taken = inspect.signature(model.forward).parameters
    if "position_ids" not in taken:
        return None
    ids = torch.tensor([list(prompts[0][:n])], device=next(model.parameters()).device)
    least = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}  # none is wanted
    said = model(input_ids=ids, use_cache=True, **least)
    begun: Any = getattr(said, "past_key_values", None)  # some keep their state elsewhere
    if type(begun) is not DynamicCache or any(type(x) is not DynamicLayer for x in begun.layers):
        return None
    begun.batch_repeat_interleave(len(prompts))
    return begun


def n_alike(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; at least one of each is left over."""
    rows = [tuple(prompt) for prompt in prompts]
    first, last = min(rows), max(rows)  # in the order of their tokens: all lie between
    n = min(map(len, rows)) - 1
    return next((i for i in range(n) if first[i] != last[i]), n)
