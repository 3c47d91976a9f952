"""Batches of examples, and one forward pass to the logits of their target tokens.

Shapes: B records, S sequence tokens, T target tokens of the longest record, N target tokens of
the batch (flattened, record after record), V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from memlaw.data.record import Example
from memlaw.model.body import body_name, body_of


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples as tensors, padded on one side.

    Attributes:
        input_ids: prompt, then target.
        attention_mask: 1 on real tokens, by their place, never by their value:
            a pad token that shares its id with the end-of-turn token hides nothing.
        keep: positions whose next token is a target token.
        target_ids: the target tokens, record after record.
        position_ids: places in the record, where pads stand before it; None: places in the row.
    """

    input_ids: Int64[Tensor, "B S"]
    attention_mask: Int64[Tensor, "B S"]
    keep: Bool[Tensor, "B S"]
    target_ids: Int64[Tensor, "N"]
    position_ids: Int64[Tensor, "B S"] | None = None


def unflatten(values: Shaped[Tensor, "N"], mask: Bool[Tensor, "B T"]) -> Shaped[Tensor, "B T"]:
    """The values put to the True places of the mask, row by row; zero elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def collate(
    examples: Sequence[Example], device: torch.device | str = "cpu", *, pad_left: bool = False
) -> Batch:
    """Put examples, at least one, into one batch, padded on the right, or on the left."""
    n, width = len(examples), max(len(e.prompt_ids) + len(e.target_ids) for e in examples)
    input_ids = torch.zeros(n, width, dtype=torch.long)
    attention_mask = torch.zeros(n, width, dtype=torch.long)
    keep = torch.zeros(n, width, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids = example.prompt_ids + example.target_ids
        first = width - len(ids) if pad_left else 0
        end = first + len(ids)
        input_ids[row, first:end] = torch.tensor(ids)
        attention_mask[row, first:end] = 1
        keep[row, end - len(example.target_ids) - 1 : end - 1] = True
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0).to(device) if pad_left else None
    targets = torch.tensor([t for e in examples for t in e.target_ids])
    return Batch(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        keep=keep.to(device),
        target_ids=targets.to(device),
        position_ids=positions,
    )


def in_batches(
    examples: Sequence[Example],
    rows: Sequence[int],
    *,
    most: int = 64,
    most_tokens: int = 4096,
) -> list[list[int]]:
    """Rows of the examples, in their order, in batches that a model is run on at once.

    Args:
        examples: whose lengths count.
        rows: which of them.
        most: in a batch.
        most_tokens: of a batch, pads included; a longer example is a batch by itself.
    """
    batches: list[list[int]] = []
    longest = 0
    for row in rows:
        n = len(examples[row].prompt_ids) + len(examples[row].target_ids)
        longest = max(longest, n)
        fits = batches and (len(batches[-1]) + 1) * longest <= most_tokens
        if fits and len(batches[-1]) < most:
            batches[-1].append(row)
        else:
            batches.append([row])
            longest = n
    return batches


def target_logits(model: Any, batch: Batch) -> Float[Tensor, "N V"]:
    """Logits of the target tokens, teacher-forced.

    The same as `model(input_ids, attention_mask).logits[keep]`. If the model's `forward` has the
    argument `logits_to_keep`, the head is computed only at positions before a target token.

    Returns:
        [N, V] in the model's dtype.
    """
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "use_cache": False,
    }
    taken = inspect.signature(model.forward).parameters
    if batch.position_ids is not None and "position_ids" in taken:
        inputs["position_ids"] = batch.position_ids
    if "logits_to_keep" not in taken:
        return model(**inputs).logits[batch.keep]
    if _keeps_by_row():
        logits = model(**inputs, logits_to_keep=batch.keep).logits
        return logits if logits.dim() == 2 else logits[batch.keep]
    columns = batch.keep.any(dim=0).nonzero()[:, 0]  # that any row needs
    logits = model(**inputs, logits_to_keep=columns).logits
    return logits[batch.keep[:, columns]]


@functools.cache
def _keeps_by_row() -> bool:
    """Whether Transformers' models take a mask of rows and positions as `logits_to_keep`."""
    from transformers import __version__

    return tuple(int(part) for part in __version__.split(".")[:2]) >= (5, 21)


def logits_of(model: Any, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
    """Logits of final hidden states, with whatever scaling or capping the model has.

    Calls the model's own `forward`, with the body replaced by one that returns `hidden`.

    Args:
        model: a Transformers causal language model.
        hidden: [N, D], as the body's `last_hidden_state`.

    Returns:
        [N, V] in the model's dtype.
    """
    with known_body(model, hidden):
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        return model(input_ids=ids, use_cache=False).logits.squeeze(0)


@contextmanager
def known_body(model: Any, hidden: Float[Tensor, "N D"]) -> Iterator[None]:
    """Within the block the model's body is one that returns `hidden`, whatever it is given."""
    name = body_name(model)
    body = getattr(model, name)
    setattr(model, name, _KnownBody(hidden[None], body))
    try:
        yield
    finally:
        setattr(model, name, body)


def head_is_apart(model: Any, example: Example) -> bool:
    """Whether a model's logits follow from its final hidden states, by `logits_of`.

    Measured on one example, with whatever adapter is attached.
    """
    batch = collate([example], next(model.parameters()).device)
    with torch.no_grad():
        expected = target_logits(model, batch).float()
        try:
            states = body_of(model)(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
            found = logits_of(model, states.last_hidden_state[batch.keep]).float()
        except Exception:  # whatever a head asks for that isn't there
            return False
    limit = 1e-3 if model.dtype == torch.float32 else 0.1
    return found.shape == expected.shape and bool(
        (found - expected).norm() <= limit * expected.norm()
    )


class _KnownBody(torch.nn.Module):
    def __init__(self, hidden: Float[Tensor, "1 N D"], body: torch.nn.Module) -> None:
        super().__init__()
        self.hidden = hidden
        self.__dict__["body"] = body  # not as a part of this one

    def __getattr__(self, name: str) -> Any:
        """Whatever else a head asks of the body (a multiplier, …) is the body's own."""
        return getattr(self.__dict__["body"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _known_states()(last_hidden_state=self.hidden)

    @property
    def decoder(self) -> _KnownBody:
        """Some models call their body's decoder; its output is the body's."""
        return self


@functools.cache
def _known_states() -> type:
    from transformers.modeling_outputs import BaseModelOutput

    class KnownStates(BaseModelOutput):
        """Final hidden states; whatever else a body may return (router logits, …) is None."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return None

    return KnownStates
