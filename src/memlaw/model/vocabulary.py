"""Tokens that a model can't read or can't say: found before anything is run or trained.

Shapes: V rows of embedding or head, D width, T target tokens of an example.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from memlaw.core.errors import ModelError
from memlaw.data.record import Example
from memlaw.model.body import body_of
from memlaw.model.forward import collate

_ROOM = 4.0  # by how much an adapter may lengthen a final hidden state


def require_rows(model: Any, tokenizer: Any, inputs: Iterable[Sequence[int]]) -> None:
    """See that the embedding has a row for each token.

    Args:
        model: a Transformers causal language model.
        tokenizer: what made the tokens.
        inputs: token ids.

    Raises:
        ModelError: names the first tokens that have none.
    """
    n_rows = model.get_input_embeddings().weight.shape[0]
    above = sorted({token for ids in inputs for token in ids if token >= n_rows})
    if above:
        named = ", ".join(f"{tokenizer.decode([t])!r} (id {t})" for t in above[:3])
        raise ModelError(
            f"the model's embedding has {n_rows} rows, ids 0 to {n_rows - 1}, and the tokenizer "
            f"gives the prompts or answers {named}{' …' if len(above) > 3 else ''}. Name a "
            "tokenizer of this model's, an adapter that brings these rows, or another model; or "
            "resize the embedding (resize_token_embeddings) and train the new rows."
        )


def require_sayable(model: Any, tokenizer: Any, examples: Sequence[Example], line: float) -> None:
    """See that no target token's row of the head is another's, so that neither can win.

    Rows count as equal, too, where they differ by so little that no final hidden state of a likely
    length tells them apart.

    Args:
        model: a Transformers causal language model, without an adapter.
        tokenizer: the examples'.
        examples: at least one.
        line: the p that each target token is to reach, in [0.5, 1).

    Raises:
        ModelError: names a token that can't reach it, and those whose rows equal its own.
    """
    head = model.get_output_embeddings()
    if head is None:
        return
    weight = head.weight.detach()
    bias = getattr(head, "bias", None)
    targets = sorted({token for e in examples for token in e.target_ids if token < len(weight)})
    # By how much logits must differ, and how far apart rows so must be.
    least = math.log(line / (1 - line)) / (_ROOM * _hidden_norm(model, examples[0]))
    probe = torch.ones(weight.shape[1], device=weight.device) / weight.shape[1] ** 0.5
    places = weight.float() @ probe  # [V]: rows that are close are close here, too
    order = places.sort()
    for token in targets:
        low, high = torch.searchsorted(
            order.values,
            torch.stack([places[token] - 2 * least, places[token] + 2 * least]),
        ).tolist()
        near = order.indices[low : high + 1]
        apart = (weight[near].float() - weight[token].float()).norm(dim=1)
        same = apart < least
        if bias is not None:
            same &= bias[near] == bias[token]
        equal = sorted(set(near[same].tolist()) - {token})
        if equal:
            names = ", ".join(f"{tokenizer.decode([t])!r} (row {t})" for t in equal[:3])
            raise ModelError(
                f"this model can't say {tokenizer.decode([token])!r} with p ≥ {line:g}: its row of "
                f"the head, {token}, equals {'that' if len(equal) == 1 else 'those'} of {names}"
                f"{' …' if len(equal) > 3 else ''}, as where they were never trained, so that "
                f"nothing below the head gives it more than p 1/{len(equal) + 1}. Name a model in "
                "which it was trained (a chat model for chats), or use --prompt-format plain."
            )


def _hidden_norm(model: Any, example: Example) -> float:
    """The largest norm of a final hidden state before an example's targets [T, D]."""
    batch = collate([example], next(model.parameters()).device)
    with torch.no_grad():
        states = body_of(model)(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
    return float(states.last_hidden_state[batch.keep].float().norm(dim=-1).max())
