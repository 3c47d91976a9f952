"""Damage: how much worse a model has become on text it was not trained on.

Shapes: W windows, S tokens a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from memlaw.core.errors import DataError
from memlaw.core.intervals import mean_interval
from memlaw.data.texts import sha256_of
from memlaw.model.head import row_blocks

Tensor = torch.Tensor
N_WINDOWS = 32
WINDOW_TOKENS = 128
_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Change on unseen text, adapted model against base model, over the same tokens.

    Attributes:
        delta_nll_nats: mean rise of the negative log-likelihood a token; < 0 is an improvement.
        delta_nll_ci95: its 95 % interval (Student's t over windows).
        kl_nats: mean KL(base ‖ adapted) a token, ≥ 0.
        kl_ci95: its 95 % interval.
        base_nll_nats: the base model's mean negative log-likelihood a token.
        n_windows, n_tokens: how much text.
        text: where it comes from.
        text_sha256: hash of it.
        by_window: for each window the rise of the negative log-likelihood, and the KL divergence.
    """

    delta_nll_nats: float
    delta_nll_ci95: tuple[float, float]
    kl_nats: float
    kl_ci95: tuple[float, float]
    base_nll_nats: float
    n_windows: int
    n_tokens: int
    text: str
    text_sha256: str
    by_window: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval of ΔNLL: what a bound is held against."""
        return self.delta_nll_ci95[1]

    def to_json(self) -> dict[str, Any]:
        """All but the single windows."""
        content = asdict(self)
        del content["by_window"]
        return content


def windows(
    tokenizer: Any,
    text: str,
    *,
    context: int | None,
    n_windows: int = N_WINDOWS,
    name: str = "the text to measure damage on",
) -> Tensor:
    """Evenly spread windows of a text: [W, S] int64 token ids.

    Args:
        tokenizer: the model's.
        text: the text.
        context: the model's context length, if it has one.
        n_windows: W, at most.
        name: what messages call the text.

    Raises:
        DataError: the text has fewer than two windows' worth of tokens.
    """
    # Tokenise no more than is likely needed: evenly spread passages of the text.
    n_chars = WINDOW_TOKENS * 16
    step = max(n_chars, len(text) // n_windows)
    size = min(WINDOW_TOKENS, context or WINDOW_TOKENS)
    found = []
    for start in range(0, len(text), step):
        ids = tokenizer(text[start : start + n_chars])["input_ids"][:size]
        if len(ids) == size:
            found.append(ids)
    if len(found) < 2:
        raise DataError(f"{name} is too short: it needs at least {2 * n_chars} characters.")
    return torch.tensor(found[:n_windows])


@torch.inference_mode()
def measure_damage(
    model: Any,
    adapted: Callable[[], AbstractContextManager[Any]],
    token_windows: Tensor,
    *,
    text_name: str,
    text: str,
) -> Damage:
    """Compare the model without and with an adapter on the same text.

    Args:
        model: the base model.
        adapted: gives a context whose value is the model with the adapter.
        token_windows: [W, S] token ids, W ≥ 2.
        text_name: where the text comes from.
        text: the text, for its hash.
    """
    device = next(model.parameters()).device
    base_nll: list[Tensor] = []
    nll: list[Tensor] = []
    kl: list[Tensor] = []
    for ids in token_windows.to(device).split(_BATCH):
        before = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        with adapted() as changed:
            now = changed(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        by_token = _compare(before, now, ids[:, 1:].flatten())  # three of [batch · (S − 1)]
        for found, values in zip((base_nll, nll, kl), by_token, strict=True):
            found.append(values.view(len(ids), -1).mean(dim=1))
    base, after, divergence = (torch.cat(x).cpu().double() for x in (base_nll, nll, kl))
    delta = after - base
    return Damage(
        delta_nll_nats=float(delta.mean()),
        delta_nll_ci95=mean_interval(delta.tolist()),
        kl_nats=float(divergence.mean()),
        kl_ci95=mean_interval(divergence.tolist()),
        base_nll_nats=float(base.mean()),
        n_windows=len(base),
        n_tokens=len(base) * (token_windows.shape[1] - 1),
        text=text_name,
        text_sha256=sha256_of(text),
        by_window=tuple(zip(delta.tolist(), divergence.tolist(), strict=True)),
    )


def _compare(before: Tensor, after: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """NLL before, NLL after, and KL(before ‖ after), each [N] nats, from logits [N, V]."""
    found = []
    for rows in row_blocks(before):
        log_p, log_q = (x[rows].float().log_softmax(dim=1) for x in (before, after))
        target = targets[rows, None]
        found.append(
            torch.stack(
                [
                    -log_p.gather(1, target)[:, 0],
                    -log_q.gather(1, target)[:, 0],
                    (log_p.exp() * (log_p - log_q)).sum(dim=1),
                ]
            )
        )
    nll_before, nll_after, kl = torch.cat(found, dim=1)
    return nll_before, nll_after, kl
