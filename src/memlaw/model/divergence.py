"""How far an adapted model's predictions are from the bare one's, and the gradient of that.

Shapes: M positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from memlaw.model.head import row_blocks

_MOST_ROWS = 128  # of logits at a time, three of which are in memory


def divergence(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "M D"],
    base_hidden: Float[Tensor, "M D"],
    *,
    max_rows: int,
) -> tuple[Float32[Tensor, "M"], Float[Tensor, "M D"]]:
    """KL(base ‖ adapted) at each position, and its gradient, in little memory.

    Args:
        head: maps hidden states [n, D] to logits [n, V], each row independently.
        hidden: final hidden states of the adapted model; without a graph.
        base_hidden: those of the bare one.
        max_rows: the most rows of logits in memory at a time; at least 1.

    Returns:
        KL [M] in nats, ≥ 0 but for rounding; and its gradient with respect to `hidden`.
    """
    kl, at_hidden = [hidden.new_zeros(0, dtype=torch.float32)], torch.empty_like(hidden)
    size = min(max_rows, _MOST_ROWS)
    for part in (slice(start, start + size) for start in range(0, len(hidden), size)):
        leaf = hidden[part].detach().requires_grad_()
        with torch.no_grad():
            before = head(base_hidden[part])
        with torch.enable_grad():
            after = head(leaf)
        values, by_logit = _kl(before, after.detach())
        kl.append(values)
        (at_hidden[part],) = torch.autograd.grad(after, leaf, by_logit)
    return torch.cat(kl), at_hidden


def _kl(
    before: Float[Tensor, "n V"], after: Float[Tensor, "n V"]
) -> tuple[Float32[Tensor, "n"], Float[Tensor, "n V"]]:
    """KL(before ‖ after) of logits of any dtype, and its gradient by `after`; in float32."""
    gradient, kl = torch.empty_like(after), []
    for rows in row_blocks(after):
        log_p, log_q = (x[rows].float().log_softmax(dim=1) for x in (before, after))
        p = log_p.exp()
        kl.append((p * (log_p - log_q)).sum(dim=1))
        gradient[rows] = log_q.exp_().sub_(p)
    return torch.cat(kl), gradient
