"""From final hidden states to losses and back, in little memory.

Shapes: N target tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from memlaw.engine import Losses

Tensor = torch.Tensor
_CPU_BLOCK_ROWS = 16  # of float32 logits that fit a core's cache
_BLOCK_ROWS = 1024


def row_blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows to work on in float32, one after the other.

    On a CPU few enough to stay in its cache, which makes the work several times faster than
    whole-tensor operations; elsewhere many.
    """
    size = _CPU_BLOCK_ROWS if logits.device.type == "cpu" else _BLOCK_ROWS
    for start in range(0, len(logits), size):
        yield slice(start, start + size)


def head_losses(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, *, max_rows: int
) -> Losses:
    """The losses of `cross_entropy(head(hidden).float(), targets)`, and their gradient.

    At most `max_rows` rows of logits are held at a time. Where there are more, or where few
    tokens have a weight, the way back runs through the head again, for tokens with a weight only.

    Args:
        head: hidden states [n, D] to logits [n, V], each row for itself.
        hidden: [N, D], with a graph.
        targets: [N] int64.
        max_rows: at least 1.
    """
    fits = len(targets) <= max_rows
    leaf = hidden.detach().requires_grad_(fits)
    parts = []
    with torch.set_grad_enabled(fits):
        for states, target in zip(leaf.split(max_rows), targets.split(max_rows), strict=True):
            logits = head(states)
            parts.append(_cross_entropy(logits.detach(), target, with_gradient=fits))
    gradient = parts[0][2]  # [N, V] of each token's loss; None where it doesn't fit

    def backward(weights: Tensor) -> None:
        active = weights.nonzero()[:, 0]
        if gradient is not None and 2 * len(active) > len(targets):
            (by_token,) = torch.autograd.grad(logits, leaf, gradient)
            hidden.backward((weights[:, None] * by_token).to(hidden.dtype))
            return
        at_hidden = torch.zeros_like(hidden)
        for chosen in active.split(max_rows):
            part = hidden.detach()[chosen].requires_grad_()
            again = head(part)
            _, _, by_logit = _cross_entropy(again.detach(), targets[chosen], with_gradient=True)
            (by_token,) = torch.autograd.grad(again, part, by_logit)
            at_hidden[chosen] = (weights[chosen][:, None] * by_token).to(hidden.dtype)
        hidden.backward(at_hidden)

    return Losses(
        nll=torch.cat([nll for nll, _, _ in parts]),
        correct=torch.cat([correct for _, correct, _ in parts]),
        backward=backward,
    )


def _cross_entropy(
    logits: Tensor, targets: Tensor, *, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss [N] float32, whether the target is the argmax [N], and d loss / d logits [N, V].

    Computed in float32 from logits of any dtype.
    """
    gradient = torch.empty_like(logits) if with_gradient else None
    nll, correct = [], []
    for rows in row_blocks(logits):
        target = targets[rows, None]  # [n, 1]
        x = logits[rows].to(torch.float32, copy=True)
        top, argmax = x.max(dim=1, keepdim=True)
        x -= top
        at_target = x.gather(1, target)
        total = x.exp_().sum(dim=1, keepdim=True)
        nll.append((total.log() - at_target)[:, 0])
        correct.append((argmax == target)[:, 0])
        if gradient is not None:
            x /= total
            x.scatter_add_(1, target, torch.full_like(at_target, -1.0))
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
