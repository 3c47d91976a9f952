"""From final hidden states to losses and back, in little memory.

Shapes: N target tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

Tensor = torch.Tensor
_CPU_BLOCK_ROWS = 16  # of float32 logits that fit a core's cache
_BLOCK_ROWS = 1024
_CPU_PIECE_ROWS = (
    512  # of logits: enough for the matrix unit, few enough to lie in pages used before
)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What a forward pass found, and how to send gradients back from it.

    Attributes:
        nll: [N] float32, nats, without a graph.
        correct: [N] bool: no other token has a higher logit.
        backward: adds the gradient of `Σ weights · nll`, weights [N], to the adapters'.
    """

    nll: Tensor
    correct: Tensor
    backward: Callable[[Tensor], None]


def row_blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows to work on in float32, one after the other.

    On a CPU few enough to stay in its cache, which makes the work several times faster than
    whole-tensor operations; elsewhere many.
    """
    size = _CPU_BLOCK_ROWS if logits.device.type == "cpu" else _BLOCK_ROWS
    for start in range(0, len(logits), size):
        yield slice(start, start + size)


def head_losses(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    dense: Tensor,
    max_rows: int,
) -> Losses:
    """The losses of `cross_entropy(head(hidden).float(), targets)`, and their gradient.

    Logits are made a piece at a time. Where a piece holds a `dense` token, the gradient of each of
    its losses at its hidden state is taken at once, while the logits are there; for the others
    the head runs again on the way back, for tokens with a weight only.

    Args:
        head: hidden states [n, D] to logits [n, V], each row for itself.
        hidden: [N, D], with a graph.
        targets: [N] int64.
        dense: [N] bool: tokens that will surely have a weight. It decides what is computed when,
            not what comes out.
        max_rows: rows of logits that are held at a time, at most; at least 1.
    """
    largest = min(max_rows, _CPU_PIECE_ROWS) if hidden.device.type == "cpu" else max_rows
    at_hidden = torch.zeros_like(hidden)  # [N, D]: of each token's own loss
    known = torch.zeros_like(dense)
    nll, correct = [], []
    size = -(-len(targets) // -(-len(targets) // largest))  # pieces of nearly the same size
    for start in range(0, len(targets), size):
        rows = slice(start, start + size)
        if dense[rows].any():
            losses, right = _with_gradient(head, hidden[rows], targets[rows], at_hidden[rows])
            known[rows] = True
        else:
            with torch.no_grad():
                losses, right, _ = _cross_entropy(head(hidden[rows].detach()), targets[rows])
        nll.append(losses)
        correct.append(right)

    def backward(weights: Tensor) -> None:
        missing = (~known & (weights != 0)).nonzero()[:, 0]
        for chosen in missing.split(largest) if len(missing) else ():
            found = torch.empty_like(at_hidden[chosen])
            _with_gradient(head, hidden[chosen], targets[chosen], found)
            at_hidden[chosen] = found
        hidden.backward((weights[:, None] * at_hidden).to(hidden.dtype))

    return Losses(nll=torch.cat(nll), correct=torch.cat(correct), backward=backward)


def _with_gradient(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, into: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss [n], whether the target is the argmax [n]; `into` [n, D] gets d loss / d hidden."""
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        logits = head(leaf)
    nll, correct, by_logit = _cross_entropy(logits.detach(), targets, with_gradient=True)
    (by_hidden,) = torch.autograd.grad(logits, leaf, by_logit)
    into.copy_(by_hidden)
    return nll, correct


def _cross_entropy(
    logits: Tensor, targets: Tensor, *, with_gradient: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss [N] float32, whether no logit is higher [N], and d loss / d logits [N, V].

    Computed in float32 from logits of any dtype.
    """
    gradient = torch.empty_like(logits) if with_gradient else None
    nll, correct = [], []
    for rows in row_blocks(logits):
        target = targets[rows, None]  # [n, 1]
        x = logits[rows].to(torch.float32, copy=True)
        x -= x.amax(dim=1, keepdim=True)
        at_target = x.gather(1, target)
        total = x.exp_().sum(dim=1, keepdim=True)
        loss = total.log() - at_target
        nll.append(loss[:, 0])
        correct.append(at_target[:, 0] == 0)
        if gradient is not None:
            x /= total
            x.scatter_(1, target, torch.expm1(-loss))  # p − 1
            gradient[rows] = x
    return torch.cat(nll), torch.cat(correct), gradient


def sampled_score(logits: Tensor, u: Tensor) -> Tensor:
    """d log p(token) / d logits for a token drawn from each row's own distribution.

    Args:
        logits: [N, V], any dtype.
        u: [N] float32, uniform on [0, 1): the draws.

    Returns:
        [N, V] in the logits' dtype.
    """
    score = torch.empty_like(logits)
    for rows in row_blocks(logits):
        p = logits[rows].float().softmax(dim=1)
        drawn = (p.cumsum(dim=1) < u[rows, None]).sum(dim=1, keepdim=True)
        drawn = drawn.clamp(max=p.shape[1] - 1)
        score[rows] = p.neg_().scatter_add_(1, drawn, torch.ones_like(p[:, :1]))
    return score
