"""Answers before and after: decoded, as text, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from memlaw.measure.decode import greedy_decode

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One prompt, answered by the bare model and by the adapted one.

    Attributes:
        prompt: on one line.
        before, after: the answers.
        kind: what it is an example of.
        kl_nats: KL(base ‖ adapted) along the answer before, nats per token; None: not measured.
    """

    prompt: str
    before: str
    after: str
    kind: str
    kl_nats: float | None = None


def decoded(
    adapted: Callable[[], AbstractContextManager[Any]],
    prompts: Sequence[tuple[int, ...]],
    *,
    end_id: int,
    max_tokens: int,
) -> list[tuple[int, ...]]:
    """Greedy answers of the adapted model, prompts of similar length in a batch.

    Args:
        adapted: returns a context in which the model has the adapter; its value is that model.
        prompts: token ids.
        end_id: the token to stop at.
        max_tokens: most tokens of an answer, ≥ 1.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    found: dict[int, tuple[int, ...]] = {}
    if order:
        with adapted() as model:
            for at in range(0, len(order), _BATCH):
                rows = order[at : at + _BATCH]
                answers = greedy_decode(
                    model,
                    [prompts[i] for i in rows],
                    end_id=end_id,
                    max_tokens=[max_tokens] * len(rows),
                    together=True,
                )
                found.update(zip(rows, answers, strict=True))
    return [found[i] for i in range(len(prompts))]


def answer_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """An answer as text, without special tokens."""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ).strip()
