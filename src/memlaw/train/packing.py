"""Packs: the records of several steps as one sequence without a pad token in it.

A tree is a prefix that most prompts share, with the rest of several records behind it, or a record
that doesn't begin so, by itself; a pack is a sequence of trees. Shapes: P tokens of the prefix, S
of the pack, N target tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from memlaw.data.record import Example
from memlaw.train.attention import Trees, lay_out

Tree = list[int]  # rows of the examples that share one prefix in a pack
# How records are packed: many trees a pack, attending along the trees; one tree a pack, under a
# dense mask (so attention is quadratic in the pack); or one record a pack.
Layout = Literal["trees", "mask", "alone"]
PACK_TOKENS = {"trees": 8192, "mask": 768, "alone": 1}


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Trees, one behind the other, as one sequence.

    Attributes:
        input_ids: the tokens.
        position_ids: each record counts on from its prefix.
        trees: where they stand.
        mask: additive, in the model's dtype, if one is needed.
        keep: positions whose next token is a target token.
        target_ids: the tokens at those places, shifted by one.
        places: where the tokens' activations lie in the cache.
        lengths: how many tokens each tree has.
        active: where activated adapters are active; None: adapters are active everywhere.
    """

    input_ids: Int64[Tensor, "1 S"]
    position_ids: Int64[Tensor, "1 S"]
    trees: Trees
    mask: Float[Tensor, "1 1 S S"] | None
    keep: Bool[Tensor, "S"]
    target_ids: Int64[Tensor, "N"]
    places: Int64[Tensor, "S"]
    lengths: list[int]
    active: Bool[Tensor, "1 S"] | None


class Packer:
    """Puts examples into packs.

    Args:
        examples: what there is to pack.
        device: where packs are wanted.
        dtype: of masks.
        n_alike: the prefix is what the first so many examples begin with; default: all.

    Attributes:
        n_prefix: P.
        shares: for each example whether it begins with the prefix, and has a token behind it.
        starts: [examples + 1] int64: where each record's rest begins in the cache.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        device: torch.device,
        dtype: torch.dtype,
        n_alike: int | None = None,
    ) -> None:
        self.examples, self.device, self.dtype = examples, device, dtype
        p = self.n_prefix = shared_prefix(examples[:n_alike])
        prefix = examples[0].prompt_ids[:p]
        self.shares = [len(e.prompt_ids) > p and e.prompt_ids[:p] == prefix for e in examples]
        lengths = [n_tokens(e) - p * s for e, s in zip(examples, self.shares, strict=True)]
        self.starts = torch.tensor([0, *lengths]).cumsum(0) + p

    def split(
        self, jobs: Sequence[Sequence[int]], layout: Layout
    ) -> Iterator[list[tuple[int, Tree]]]:
        """Split the rows of jobs into packs of limited length: lists of (job, tree)."""
        limit = PACK_TOKENS[layout]
        pack: list[tuple[int, Tree]] = []
        room = limit
        for job, rows in enumerate(jobs):
            opens = True  # a new tree is needed
            for row in rows:
                length = int(self.starts[row + 1] - self.starts[row])
                opens = opens or not self.shares[row]
                before = self.n_prefix if opens and self.shares[row] else 0
                if pack and (length + before > room or (opens and layout != "trees")):
                    yield pack
                    pack, room, opens = [], limit, True
                if opens:
                    pack.append((job, []))
                    room -= self.n_prefix if self.shares[row] else 0
                pack[-1][1].append(row)
                room -= length
                opens = not self.shares[row]  # what doesn't share is a tree by itself
        if pack:
            yield pack

    def pack(self, trees: Sequence[Tree], layout: Layout) -> Pack:
        """Trees as one pack."""
        ids: list[int] = []
        owner: list[int] = []  # record of each token, −1 for the prefix
        positions: list[int] = []
        keep: list[bool] = []
        targets: list[int] = []
        places: list[Tensor] = []
        lengths: list[int] = []
        active: list[bool] = []
        for rows in trees:
            begun = len(ids)
            p = self.n_prefix if self.shares[rows[0]] else 0
            ids += self.examples[rows[0]].prompt_ids[:p]
            owner += [-1] * p
            positions += range(p)
            keep += [False] * p
            active += _active(self.examples[rows[0]], range(p))
            places.append(torch.arange(p))
            for row in rows:
                example = self.examples[row]
                rest = (example.prompt_ids + example.target_ids)[p:]
                n_targets = len(example.target_ids)
                ids += rest
                owner += [len(places)] * len(rest)  # a row may be there twice
                positions += range(p, p + len(rest))
                active += _active(example, range(p, p + len(rest)))
                keep += [False] * (len(rest) - n_targets - 1) + [True] * n_targets + [False]
                targets += example.target_ids
                places.append(torch.arange(int(self.starts[row]), int(self.starts[row + 1])))
            lengths.append(len(ids) - begun)
        device = self.device
        return Pack(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            trees=lay_out(
                self.n_prefix,
                [
                    (
                        self.shares[rows[0]],
                        [int(self.starts[r + 1] - self.starts[r]) for r in rows],
                    )
                    for rows in trees
                ],
                device,
            ),
            mask=_tree_mask(owner, self.dtype).to(device)
            if layout == "mask" and len(trees[0]) > 1
            else None,
            keep=torch.tensor(keep, device=device),
            target_ids=torch.tensor(targets, device=device),
            places=torch.cat(places),
            lengths=lengths,
            active=None
            if self.examples[0].active_from is None
            else torch.tensor([active], device=device),
        )


def n_tokens(example: Example) -> int:
    """Of prompt and target together."""
    return len(example.prompt_ids) + len(example.target_ids)


def shared_prefix(examples: Sequence[Example]) -> int:
    """How many tokens all prompts begin with; at least one token of each prompt is left over.

    Where adapters become active at different positions, it ends before the first of them.
    """
    first = examples[0].prompt_ids
    n = min(len(e.prompt_ids) for e in examples) - 1
    for example in examples:
        while example.prompt_ids[:n] != first[:n]:
            n -= 1
    starts = {e.active_from for e in examples if e.active_from is not None}
    return min(n, *starts) if len(starts) > 1 else n


def _active(example: Example, positions: Sequence[int]) -> list[bool]:
    """At which of its positions an activated adapter is active."""
    return [at >= (example.active_from or 0) for at in positions]


def _tree_mask(owner: Sequence[int], dtype: torch.dtype) -> Tensor:
    """[1, 1, S, S] additive mask: causal, and only within one's own record and the prefix (−1)."""
    who = torch.tensor(owner)
    order = torch.arange(len(owner))
    seen = (order[None] <= order[:, None]) & ((who[None] == who[:, None]) | (who[None] == -1))
    mask = torch.zeros(len(owner), len(owner), dtype=dtype)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[None, None]
