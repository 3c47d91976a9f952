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
from memlaw.model.forward import collate, logits_of

_ROOM = 4.0  # by how much an adapter may lengthen a final hidden state
_SLACK = 1.05  # for rounding, and for norms that take off the mean
_SHORTEST = 64  # rows of target tokens that are looked at
_AT_ONCE = 512  # hidden states


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
    """See that the head can give each target token the p that it is to reach.

    It can't where a token's row is another's, or differs from it by so little that no final hidden
    state of a likely length tells them apart; nor where rows are so short that the model's final
    norm lets no hidden state through that is long enough, as in models with random weights.

    Args:
        model: a Transformers causal language model, without an adapter.
        tokenizer: the examples'.
        examples: at least one.
        line: the p that each target token is to reach, in [0.5, 1).

    Raises:
        ModelError: names a token that can't reach it, and why.
    """
    head = model.get_output_embeddings()
    if head is None:
        return
    n_rows = len(head.weight)
    targets = sorted({token for e in examples for token in e.target_ids if token < n_rows})
    states, longest = _final_states(model, examples[0])
    _require_apart(model, tokenizer, states, targets, line)
    _require_long(model, tokenizer, states, longest, targets, line)


def _require_apart(
    model: Any, tokenizer: Any, states: torch.Tensor, targets: Sequence[int], line: float
) -> None:
    head = model.get_output_embeddings()
    weight, bias = head.weight.detach(), getattr(head, "bias", None)
    # By how much logits must differ, and how far apart rows so must be.
    norm = float(states.float().norm(dim=-1).max())
    least = math.log(line / (1 - line)) / (_ROOM * norm)
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


def _require_long(
    model: Any,
    tokenizer: Any,
    states: torch.Tensor,
    longest: float | None,
    targets: Sequence[int],
    line: float,
) -> None:
    """Two logits differ by no more than their rows' distance times the hidden state's length."""
    slope = _slope(model, states)
    if longest is None or slope is None:
        return
    head = model.get_output_embeddings()
    weight = head.weight.detach().float()
    rows = torch.tensor(targets, device=weight.device)
    rows = rows[weight[rows].norm(dim=1).argsort()[:_SHORTEST]]
    most = slope * longest * torch.cdist(weight[rows], weight)  # [rows, V]
    if (bias := getattr(head, "bias", None)) is not None:
        most += slope * (bias[rows, None] - bias)
    p = torch.exp(-torch.logsumexp(-most, dim=1))
    if float(p.min()) < line:
        token = int(rows[p.argmin()])
        raise ModelError(
            f"this model can't say {tokenizer.decode([token])!r} with p ≥ {line:g}: behind its "
            f"final norm hidden states are at most {longest:.3g} long, and for that its head's "
            f"rows are so short that no adapter below gives the token more than p "
            f"{float(p.min()):.2g}. So it is where weights are random: name a trained model."
        )


def _slope(model: Any, states: torch.Tensor) -> float | None:
    """By how much the model multiplies what its head gives, at most; None: it does more than that.

    Soft caps only lower it.
    """
    with torch.no_grad():
        # Some bodies give float32 in any dtype, and their models cast it for the head.
        raw = model.get_output_embeddings()(states.to(model.dtype)).float()
        try:
            logits = logits_of(model, states).float()
        except Exception:  # whatever a head asks for that isn't there
            return None
    if logits.shape != raw.shape:
        return None
    clear = raw.abs() > 1e-2 * raw.abs().max()
    found = logits[clear] / raw[clear]
    if not found.numel() or not bool((found > 0).all()):
        return None
    return float(found.max())


def _final_states(model: Any, example: Example) -> tuple[torch.Tensor, float | None]:
    """Final hidden states before an example's targets [T, D]; and how long any can be.

    None: they don't come out of a norm, and may be of any length.
    """
    ran: list[tuple[Any, torch.Tensor]] = []

    def note(module: Any, _: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and "Norm" in type(module).__name__:
            ran.append((module, output))

    body = body_of(model)
    batch = collate([example], next(model.parameters()).device)
    hooks = [module.register_forward_hook(note) for module in body.modules()]
    try:
        with torch.no_grad():
            states = body(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    norm = next((m for m, out in reversed(ran) if out.data_ptr() == states.data_ptr()), None)
    return states[batch.keep], None if norm is None else _longest(norm, states)


def _longest(norm: Any, states: torch.Tensor) -> float:
    """What no output of a norm is longer than: that of an input along one axis, and its bias."""
    width = states.shape[-1]
    with torch.no_grad():
        bias = norm(states.new_zeros(1, 1, width))[0, 0]
        found = [
            float((norm(axes[None] * width**0.5)[0] - bias).float().norm(dim=1).max())
            for axes in torch.eye(width, dtype=states.dtype, device=states.device).split(_AT_ONCE)
        ]
    return _SLACK * (max(found) + float(bias.float().norm()))
