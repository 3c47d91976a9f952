"""A model that runs packs, and has shown that it computes from them what it should.

Shapes: S packed tokens, T target tokens of a record, D width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from memlaw.data.record import Example
from memlaw.model.body import body_of
from memlaw.model.forward import collate
from memlaw.train.attention import is_replaceable, tree_attention
from memlaw.train.engine import EngineError
from memlaw.train.packing import Layout, Pack, Packer, n_tokens

Tensor = torch.Tensor


class PackedModel:
    """Runs a model on packs of examples, in the cheapest layout that it computes rightly from.

    Args:
        model: frozen, in eval mode.
        examples: what there is to run.
        n_alike: the first so many examples' common beginning is what packs share; default: all.

    Attributes:
        packer: makes the packs.
        samples: the shortest, the middle and the longest record's rows: what is compared.
        layout: how records are packed.

    Raises:
        EngineError: no layout gives what whole records one by one give.
    """

    def __init__(self, model: Any, examples: Sequence[Example], n_alike: int | None = None) -> None:
        self.model, self.examples = model, examples
        self.device = next(model.parameters()).device
        self.packer = Packer(examples, self.device, model.dtype, n_alike)
        self.takes_positions = (
            "position_ids" in inspect.signature(body_of(model).forward).parameters
        )
        by_length = sorted(range(len(examples)), key=lambda row: n_tokens(examples[row]))
        self.samples = list(dict.fromkeys(by_length[i] for i in (0, len(by_length) // 2, -1)))
        window = getattr(model.config.get_text_config(), "sliding_window", None)
        self.layout = self._find_layout(self.samples, window or math.inf)

    def _find_layout(self, rows: list[int], window: float) -> Layout:
        """The cheapest way to pack from which this model computes the right things for `rows`."""
        with torch.no_grad():
            expected = [self.whole(row) for row in rows]
        can_pack = self.takes_positions and window >= max(n_tokens(e) for e in self.examples)
        tried: list[Layout] = []
        if can_pack and is_replaceable(self.model):
            tried.append("trees")
        if can_pack:
            tried.append("mask")
        for layout in (*tried, "alone"):
            self.layout = layout
            packs = [pack for pack, _ in self.packs([rows, rows[:1]])]
            try:
                with torch.no_grad():
                    found = torch.cat([self.run(pack)[pack.keep] for pack in packs])
            except Exception:  # whatever a model says to what it wasn't made for
                continue
            if self.agree(found, [*expected, expected[0]]):
                return layout
        raise self.unfit("packed records")

    def packs(self, jobs: Sequence[list[int]]) -> Iterator[tuple[Pack, list[int]]]:
        """The rows of jobs in packs, and the job of each of a pack's trees."""
        for trees in self.packer.split(jobs, self.layout):
            yield (
                self.packer.pack([tree for _, tree in trees], self.layout),
                [job for job, _ in trees],
            )

    def run(self, pack: Pack) -> Tensor:
        """Final hidden states [S, D] of a pack."""
        positions = {"position_ids": pack.position_ids} if self.takes_positions else {}
        with ExitStack() as stack:
            if self.layout == "trees":
                stack.enter_context(tree_attention(self.model, pack.trees))
            states = body_of(self.model)(
                input_ids=pack.input_ids, attention_mask=pack.mask, use_cache=False, **positions
            )
        return states.last_hidden_state[0]

    def whole(self, row: int) -> Tensor:
        """Final hidden states [T, D] that predict a record's targets, run as a user would."""
        example = self.examples[row]
        batch = collate([example], self.device)
        states = body_of(self.model)(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
        return states.last_hidden_state[0, -len(example.target_ids) - 1 : -1]

    def agree(self, found: Tensor, expected: list[Tensor]) -> bool:
        """Every record's hidden states are the expected ones, but for rounding."""
        limit = 1e-3 if self.model.dtype == torch.float32 else 0.1
        parts = found.float().split([len(e) for e in expected])
        return all(
            bool((part - e.float()).norm() <= limit * e.float().norm())
            for part, e in zip(parts, expected, strict=True)
        )

    def unfit(self, what: str) -> EngineError:
        """The error for a model that can't be run so."""
        return EngineError(
            f"{type(self.model).__name__} computes something else from {what} than from whole "
            "records, so the cached engine can't train it."
        )
