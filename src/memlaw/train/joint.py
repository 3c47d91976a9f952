"""What all sites of the bare model read at the same positions, and the gradients at their outputs.

Texts that begin alike, as chats do with their template, are run behind one beginning; the head runs
where something is looked at.

Shapes: n sampled positions, N positions of a run that are looked at, D_in and D_out widths of a
site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor, nn

from memlaw.data.record import Example, Record
from memlaw.model.body import body_of
from memlaw.model.forward import logits_of
from memlaw.model.head import sampled_score
from memlaw.model.sites import Site
from memlaw.train.held import probing
from memlaw.train.packed_model import PackedModel

_BATCH = 8  # texts of similar length that are drawn for together, and padded to one length
_PACK_TOKENS = 768  # of texts behind one beginning, about
_HEAD_ROWS = 256  # of logits at a time


@dataclass(frozen=True)
class _Run:
    """Texts that are run at once.

    Attributes:
        at: which positions of the run are looked at, in the order of the texts.
        hidden: runs them: their final hidden states there.
    """

    at: Bool[Tensor, "_ _"]
    hidden: Callable[[], Float[Tensor, "N _"]]


def joint_samples(
    model: nn.Module,
    sites: Sequence[Site],
    sequences: Sequence[Sequence[int]],
    *,
    first: int,
    seed: int,
    most: int,
) -> tuple[list[Float32[Tensor, "n _"]], list[Float32[Tensor, "n _"]]]:
    """What all sites of the bare model read at the same positions, and the gradients there.

    Args:
        model: frozen, in eval mode, no adapter attached.
        sites: where.
        sequences: token ids, each longer than `first`.
        first: positions before this one aren't looked at. Up to it all texts are the same.
        seed: of the tokens sampled for the Fisher, and of the positions.
        most: positions that are looked at, drawn from all.

    Returns:
        Inputs [n, D_in] and output gradients [n, D_out] of each site; row by row the same
        positions.
    """
    texts = sorted((tuple(sequence) for sequence in sequences), key=len)
    batches = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
    u = _draws(batches, first, seed)
    chosen = torch.ones_like(u, dtype=torch.bool)
    if len(chosen) > most:
        generator = torch.Generator().manual_seed(seed)
        picked = torch.randperm(len(chosen), generator=generator)[:most]
        chosen = torch.zeros_like(chosen).index_fill_(0, picked, True)
    device = next(model.parameters()).device
    reads: list[list[Tensor]] = [[] for _ in sites]
    writes: list[list[Tensor]] = [[] for _ in sites]
    done = 0
    for run in _behind_one_beginning(model, texts, first) or _padded(model, batches, first, device):
        with probing(model, [site.module for site in sites], run.at) as (seen, probes):
            hidden = run.hidden()
        here = slice(done, done + len(hidden))
        done += len(hidden)
        hidden.backward(_sampled_gradient(model, hidden.detach(), u[here].to(device)))
        rows = chosen[here].to(device)
        for i in range(len(sites)):
            reads[i].append(seen[i][rows].float())
            writes[i].append(probes[i].grad[rows])  # type: ignore[index]
    return [torch.cat(parts) for parts in reads], [torch.cat(parts) for parts in writes]


def _draws(
    batches: Sequence[Sequence[tuple[int, ...]]], first: int, seed: int
) -> Float32[Tensor, "_"]:
    """For each position that may be looked at, text after text, what its token is drawn by."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for texts in batches:
        u = torch.rand(len(texts), len(texts[-1]), generator=generator)
        drawn += [row[first : len(text)] for row, text in zip(u, texts, strict=True)]
    return torch.cat(drawn)


def _sampled_gradient(
    model: Any, hidden: Float[Tensor, "N D"], u: Float32[Tensor, "N"]
) -> Float[Tensor, "N D"]:
    """The gradient of log p(token) by the hidden states, for tokens drawn by `u`."""
    found = []
    for part, drawn in zip(hidden.split(_HEAD_ROWS), u.split(_HEAD_ROWS), strict=True):
        leaf = part.detach().requires_grad_()
        logits = logits_of(model, leaf)
        found += torch.autograd.grad(logits, leaf, sampled_score(logits.detach(), drawn))
    return torch.cat(found)


def _behind_one_beginning(
    model: Any, texts: Sequence[tuple[int, ...]], first: int
) -> Iterator[_Run] | None:
    """The texts in packs; None if the model can't run such, or there is nothing in common."""
    if first < 2:
        return None
    record = Record(prompt="", completion="", id="")
    examples = [
        Example(record=record, prompt_ids=text[:first], target_ids=text[first:]) for text in texts
    ]
    packed = PackedModel(model, examples)
    return _packs(packed, first) if packed.layout == "trees" else None


def _packs(packed: PackedModel, first: int) -> Iterator[_Run]:
    rows: list[int] = []
    n = 0
    for row, example in enumerate(packed.examples):
        rows.append(row)
        n += len(example.target_ids)
        if n >= _PACK_TOKENS or row == len(packed.examples) - 1:
            pack = packed.packer.pack([rows], packed.layout)
            at = pack.position_ids >= first
            yield _Run(at, lambda pack=pack, at=at: packed.run(pack)[at[0]])  # type: ignore[misc]
            rows, n = [], 0


def _padded(
    model: Any,
    batches: Sequence[Sequence[tuple[int, ...]]],
    first: int,
    device: torch.device,
) -> Iterator[_Run]:
    for texts in batches:
        width = len(texts[-1])
        ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=device)
        places = torch.arange(width, device=device)
        mask = places < torch.tensor([len(text) for text in texts], device=device)[:, None]
        at = mask & (places >= first)

        def hidden(ids: Tensor = ids, mask: Tensor = mask, at: Tensor = at) -> Tensor:
            states = body_of(model)(input_ids=ids, attention_mask=mask.long(), use_cache=False)
            return states.last_hidden_state[at]

        yield _Run(at, hidden)
