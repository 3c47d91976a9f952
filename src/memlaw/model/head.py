"""Losses of final hidden states, and their gradients, in little memory.

Shapes: N target tokens, n of them that are worked on at once, M held ones, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

_CPU_BLOCK_ROWS = 16  # of float32 logits that fit a core's cache
_BLOCK_ROWS = 1024
_CPU_PIECE_ROWS = (
    512  # of logits: enough for the matrix unit, few enough to lie in pages used before
)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of a forward pass, and its backward pass.

    Attributes:
        nll: negative log-likelihoods, in nats; not part of an autograd graph.
        correct: whether no token has a higher logit than the target.
        kl: KL(base ‖ adapted) in nats at the positions that are held to the base model; they have
            no losses. Not part of a graph either.
        backward: adds the gradient of `Σ weights · nll + Σ kl_weights · kl`, with weights [N] and
            [M] that may be left out where nothing is held, to the adapters' gradients.
    """

    nll: Float32[Tensor, "N"]
    correct: Bool[Tensor, "N"]
    kl: Float32[Tensor, "M"]
    backward: Callable[..., None]


def row_blocks(logits: Float[Tensor, "N V"]) -> Iterator[slice]:
    """Slices of rows to work on in float32, one after the other.

    On a CPU the blocks are small enough to stay in its cache, which makes the work several times
    faster than operations on the whole tensor; on other devices they are large.
    """
    size = _CPU_BLOCK_ROWS if logits.device.type == "cpu" else _BLOCK_ROWS
    for start in range(0, len(logits), size):
        yield slice(start, start + size)


def head_losses(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "N D"],
    targets: Int64[Tensor, "N"],
    *,
    dense: Bool[Tensor, "N"],
    max_rows: int,
) -> Losses:
    """The losses of `cross_entropy(head(hidden).float(), targets)`, and their gradient.

    Logits are computed piece by piece. If a piece has a `dense` token, the gradient of each of its
    losses with respect to its hidden state is computed at once, while the logits are in memory. For
    the other pieces the head is computed again in the backward pass, for tokens with a non-zero
    weight only.

    Args:
        head: maps hidden states [n, D] to logits [n, V], each row independently.
        hidden: final hidden states, part of an autograd graph.
        targets: the tokens to predict.
        dense: tokens that will certainly have a non-zero weight; on the CPU, where asking costs
            nothing. This changes the order of the computation, not its result.
        max_rows: the most rows of logits in memory at a time; at least 1.
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

    def backward(weights: Float[Tensor, "N"], kl_weights: Tensor | None = None) -> None:
        missing = (~known.to(weights.device) & (weights != 0)).nonzero()[:, 0]
        for chosen in missing.split(largest) if len(missing) else ():
            found = torch.empty_like(at_hidden[chosen])
            _with_gradient(head, hidden[chosen], targets[chosen], found)
            at_hidden[chosen] = found
        hidden.backward((weights[:, None] * at_hidden).to(hidden.dtype))

    return Losses(
        nll=torch.cat(nll),
        correct=torch.cat(correct),
        kl=hidden.new_zeros(0, dtype=torch.float32),
        backward=backward,
    )


def _with_gradient(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "n D"],
    targets: Int64[Tensor, "n"],
    into: Float[Tensor, "n D"],
) -> tuple[Float32[Tensor, "n"], Bool[Tensor, "n"]]:
    """Losses, and whether no logit is above the target's; `into` gets d loss / d hidden."""
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        logits = head(leaf)
    nll, correct, by_logit = _cross_entropy(logits.detach(), targets, with_gradient=True)
    (by_hidden,) = torch.autograd.grad(logits, leaf, by_logit)
    into.copy_(by_hidden)
    return nll, correct


def _cross_entropy(
    logits: Float[Tensor, "n V"], targets: Int64[Tensor, "n"], *, with_gradient: bool = False
) -> tuple[Float32[Tensor, "n"], Bool[Tensor, "n"], Float[Tensor, "n V"] | None]:
    """Losses, whether no logit is above the target's, and d loss / d logits.

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


def log_odds(logits: Float[Tensor, "N V"], targets: Int64[Tensor, "N"]) -> Float32[Tensor, "N"]:
    """ln p / (1 − p) of the targets, to full precision where p is next to 1, too."""
    logits, own = logits.float(), targets[:, None]
    return logits.gather(1, own)[:, 0] - logits.scatter(1, own, -torch.inf).logsumexp(dim=1)


def sampled_score(logits: Float[Tensor, "N V"], u: Float32[Tensor, "N"]) -> Float[Tensor, "N V"]:
    """Gradient of log p(token) by the logits, for a token drawn from each row's distribution.

    Args:
        logits: of any dtype.
        u: the draws, uniform on [0, 1).

    Returns:
        The gradients, in the logits' dtype.
    """
    score = torch.empty_like(logits)
    for rows in row_blocks(logits):
        p = logits[rows].float().softmax(dim=1)
        drawn = (p.cumsum(dim=1) < u[rows, None]).sum(dim=1, keepdim=True)
        drawn = drawn.clamp(max=p.shape[1] - 1)
        score[rows] = p.neg_().scatter_add_(1, drawn, torch.ones_like(p[:, :1]))
    return score
