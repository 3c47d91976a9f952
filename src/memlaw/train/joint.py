"""What all sites of the bare model read at the same positions, and the gradients at their outputs.

Texts that begin alike, as chats do with their template, are run behind one beginning; the head runs
where something is looked at.

Shapes: n sampled positions, N positions of a run that are looked at, D_in and D_out widths of a
site.
"""

from __future__ import annotations

import itertools
from collections import Counter
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
from memlaw.train.engine import EngineError
from memlaw.train.held import probing
from memlaw.train.packed_model import PackedModel

_BATCH = 8  # texts of similar length that are drawn for together, and padded to one length
_PACK_TOKENS = 768  # of texts behind one beginning, about
_BEGINNING = 8  # tokens that texts share which are run together
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
    first: Sequence[int],
    seed: int,
    most: int,
) -> tuple[list[Float32[Tensor, "n _"]], list[Float32[Tensor, "n _"]]]:
    """What all sites of the bare model read at the same positions, and the gradients there.

    Args:
        model: frozen, in eval mode, no adapter attached.
        sites: where.
        sequences: token ids.
        first: of each sequence: positions before this one aren't looked at. Nor is the last one,
            which nothing follows: at least one is left.
        seed: of the tokens sampled for the Fisher, and of the positions.
        most: positions that are looked at, drawn from all.

    Returns:
        Inputs [n, D_in] and output gradients [n, D_out] of each site; row by row the same
        positions.
    """
    texts = [_text(tuple(ids), begin) for ids, begin in zip(sequences, first, strict=True)]
    groups = [sorted(group, key=_length) for group in _by_beginning(texts)]
    u = _draws([batch for group in groups for batch in _batches(group)], seed)
    chosen = torch.ones_like(u, dtype=torch.bool)
    if len(chosen) > most:
        generator = torch.Generator().manual_seed(seed)
        picked = torch.randperm(len(chosen), generator=generator)[:most]
        chosen = torch.zeros_like(chosen).index_fill_(0, picked, True)
    device = next(model.parameters()).device
    reads: list[list[Tensor]] = [[] for _ in sites]
    writes: list[list[Tensor]] = [[] for _ in sites]
    done = 0
    for run in itertools.chain.from_iterable(
        _behind_one_beginning(model, group) or _padded(model, _batches(group), device)
        for group in groups
    ):
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


def _text(ids: tuple[int, ...], first: int) -> Example:
    """Token ids of which positions are looked at from `first` on: those before the targets."""
    record = Record(prompt="", completion="", id="")
    return Example(record=record, prompt_ids=ids[: first + 1], target_ids=ids[first + 1 :])


def _length(text: Example) -> int:
    return len(text.prompt_ids) + len(text.target_ids)


def _by_beginning(texts: Sequence[Example]) -> list[list[Example]]:
    """The texts that begin as most do, and the others."""
    beginning, n = Counter(text.prompt_ids[:_BEGINNING] for text in texts).most_common(1)[0]
    if len(beginning) < _BEGINNING or n in (1, len(texts)):
        return [list(texts)]
    parts: list[list[Example]] = [[], []]
    for text in texts:
        parts[text.prompt_ids[:_BEGINNING] != beginning].append(text)
    return parts


def _batches(texts: Sequence[Example]) -> list[Sequence[Example]]:
    return [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]


def _draws(batches: Sequence[Sequence[Example]], seed: int) -> Float32[Tensor, "_"]:
    """For each position that may be looked at, text after text, what its token is drawn by."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for texts in batches:
        u = torch.rand(len(texts), _length(texts[-1]), generator=generator)
        for row, text in zip(u, texts, strict=True):
            drawn.append(row[len(text.prompt_ids) - 1 : _length(text) - 1])
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


def _behind_one_beginning(model: Any, texts: Sequence[Example]) -> Iterator[_Run] | None:
    """The texts in packs; None if the model can't run such, or there is nothing in common."""
    if min(len(text.prompt_ids) for text in texts) < 3:
        return None
    try:
        packed = PackedModel(model, texts)
    except EngineError:
        return None
    return _packs(packed) if packed.layout == "trees" else None


def _packs(packed: PackedModel) -> Iterator[_Run]:
    rows: list[int] = []
    n = 0
    for row, text in enumerate(packed.examples):
        rows.append(row)
        n += _length(text)
        if n >= _PACK_TOKENS or row == len(packed.examples) - 1:
            pack = packed.packer.pack([rows], packed.layout)
            yield _Run(
                pack.keep[None],
                lambda pack=pack: packed.run(pack)[pack.keep],  # type: ignore[misc]
            )
            rows, n = [], 0


def _padded(
    model: Any, batches: Sequence[Sequence[Example]], device: torch.device
) -> Iterator[_Run]:
    for texts in batches:
        width = _length(texts[-1])
        ids = torch.tensor(
            [
                [*text.prompt_ids, *text.target_ids, *[0] * (width - _length(text))]
                for text in texts
            ],
            device=device,
        )
        places = torch.arange(width, device=device)
        first, lengths = (
            torch.tensor([of(text) for text in texts], device=device)[:, None]
            for of in (lambda text: len(text.prompt_ids) - 1, _length)
        )
        mask = places < lengths
        at = (places >= first) & (places < lengths - 1)

        def hidden(ids: Tensor = ids, mask: Tensor = mask, at: Tensor = at) -> Tensor:
            states = body_of(model)(input_ids=ids, attention_mask=mask.long(), use_cache=False)
            return states.last_hidden_state[at]

        yield _Run(at, hidden)
