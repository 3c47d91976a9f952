"""What an adapter changes along given texts: one pass with it, against the base model's own.

Shapes: N tokens that are predicted, text after text, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memlaw.core.files import json_sha256
from memlaw.data.record import Example, Record
from memlaw.measure.damage import compare_logits
from memlaw.model.base import BaseModel
from memlaw.model.body import body_of
from memlaw.model.cache import Kept, kept
from memlaw.model.forward import Batch, collate, logits_of, target_logits
from memlaw.model.lower_layers import recorded, replayed

Ids = tuple[int, ...]
Adapted = Callable[[], AbstractContextManager[Any]]
_BATCH = 16
_LOGITS = 2**27  # that are in memory at a time


@dataclass(frozen=True, kw_only=True)
class Change:
    """What an adapter changes along one text.

    Attributes:
        base_nll, nll: negative log-likelihood without and with it, nats per token.
        kl: KL(base ‖ adapted), nats per token, ≥ 0 but for rounding.
        base_greedy, greedy: without and with it each token of the text is the argmax: greedy
            decoding gives the text, except where rounding decides.
        lost_nats: where greedy decoding first leaves the text, how much less likely the base model
            holds that token than the text's, in nats; 0: it doesn't leave it, or they are even.
        n_tokens: tokens that were predicted.
    """

    base_nll: float
    nll: float
    kl: float
    base_greedy: bool
    greedy: bool
    lost_nats: float
    n_tokens: int


class Comparison:
    """Compares models with adapters to the base model, along the same texts.

    Args:
        base: the base model.
        texts: of each text the token ids that are given, at least one, and those that are
            predicted, at least one.
        first_layer: the lowest decoder layer that adapters change; those below it are run once.
    """

    def __init__(
        self, base: BaseModel, texts: Sequence[tuple[Ids, Ids]], first_layer: int = 0
    ) -> None:
        self.base, self.first_layer = base, first_layer
        self.examples = [
            Example(
                record=Record(prompt="", completion="", id=str(i)),
                prompt_ids=given,
                target_ids=then,
            )
            for i, (given, then) in enumerate(texts)
        ]
        self.ends = torch.tensor([len(e.target_ids) for e in self.examples]).cumsum(0).tolist()

    @functools.cached_property
    def known(self) -> dict[str, Tensor]:
        """What the base model computes, from the cache if it was computed before.

        `hidden`: [N, D], its final hidden states at the predicted tokens, text after text; `lower`:
        [all tokens of all batches, pads included, D], what goes into the first layer that adapters
        change, if it isn't the first of all.
        """
        key = [[e.prompt_ids, e.target_ids] for e in self.examples]
        settings = {"texts": json_sha256(key), "batch": _BATCH, "first_layer": self.first_layer}
        return kept(self.base, "hidden", settings, self._compute).tensors

    @functools.cached_property
    def hidden(self) -> tuple[Tensor, ...]:
        """[n, D] of each text: the base model's final hidden states at its predicted tokens."""
        return torch.tensor_split(self.known["hidden"], self.ends[:-1])

    @torch.inference_mode()
    def _compute(self) -> Kept:
        model = self.base.model
        found: dict[int, Tensor] = {}
        with recorded(model, self.first_layer) as lower:
            for rows, batch in self._batches():
                body = body_of(model)(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
                )
                parts = body.last_hidden_state[batch.keep].cpu().split(self._lengths(rows))
                found.update(zip(rows, parts, strict=True))
        tensors = {"hidden": torch.cat([found[i] for i in range(len(self.examples))])}
        if lower:
            tensors["lower"] = torch.cat([x.flatten(0, 1).cpu() for x in lower])
        return Kept(None, tensors)

    def _pass(self, changed: Any, batch: Batch, known: dict[str, Tensor], start: int) -> Tensor:
        """[N, V]: logits of a batch whose tokens start there among those of all batches."""
        shape, model, lower = batch.input_ids.shape, self.base.model, []
        if "lower" in known:
            here = known["lower"][start : start + shape.numel()]
            lower = [here.unflatten(0, shape).to(model.device)]
        with replayed(model, self.first_layer, lower):
            return target_logits(changed, batch)

    @torch.inference_mode()
    def of(self, adapted: Adapted) -> list[Change]:
        """What an adapter changes along each text.

        Args:
            adapted: returns a context in which the model has the adapter; its value is that model.
        """
        found: dict[int, Change] = {}
        known, start = self.known, 0  # of the bare model: before an adapter is attached
        for group in self._groups():
            after = []
            with adapted() as changed:
                for _, batch in group:
                    after.append(self._pass(changed, batch, known, start))
                    start += batch.input_ids.numel()
            for (rows, batch), now in zip(group, after, strict=True):
                hidden = torch.cat([self.hidden[i] for i in rows]).to(now.device)
                before = logits_of(self.base.model, hidden)
                found.update(zip(rows, self._changes(rows, batch, before, now), strict=True))
        return [found[i] for i in range(len(self.examples))]

    def _changes(self, rows: list[int], batch: Batch, before: Tensor, now: Tensor) -> list[Change]:
        lengths, targets = self._lengths(rows), batch.target_ids
        columns = [
            *compare_logits(before, now, targets),
            *((logits.argmax(dim=1) == targets).float() for logits in (before, now)),
        ]
        by_text = [
            [part.double().mean().item() for part in column.cpu().split(lengths)]
            for column in columns
        ]
        chosen = now.argmax(dim=1, keepdim=True)
        lost = before.gather(1, targets[:, None]).float() - before.gather(1, chosen).float()
        left = (chosen[:, 0] != targets).cpu().split(lengths)
        lost_by_text = [
            max(0.0, part[where][0].item()) if where.any() else 0.0
            for part, where in zip(lost[:, 0].cpu().split(lengths), left, strict=True)
        ]
        return [
            Change(
                base_nll=base_nll,
                nll=nll,
                kl=kl,
                base_greedy=base_greedy == 1,
                greedy=greedy == 1,
                lost_nats=lost_nats,
                n_tokens=n,
            )
            for base_nll, nll, kl, base_greedy, greedy, lost_nats, n in zip(
                *by_text, lost_by_text, lengths, strict=True
            )
        ]

    def _lengths(self, rows: Sequence[int]) -> list[int]:
        return [len(self.examples[i].target_ids) for i in rows]

    def _batches(self) -> list[tuple[list[int], Batch]]:
        """Texts of similar length together; the same each time, so that rounding is."""

        def length(i: int) -> int:
            return len(self.examples[i].prompt_ids) + len(self.examples[i].target_ids)

        order = sorted(range(len(self.examples)), key=lambda i: (length(i), i))
        rows = [order[at : at + _BATCH] for at in range(0, len(order), _BATCH)]
        device = self.base.model.device
        return [(own, collate([self.examples[i] for i in own], device)) for own in rows]

    def _groups(self) -> list[list[tuple[list[int], Batch]]]:
        """Batches whose logits fit into memory together."""
        room = _LOGITS // self.base.model.get_input_embeddings().num_embeddings
        groups: list[list[tuple[list[int], Batch]]] = []
        left = 0
        for rows, batch in self._batches():
            if not groups or len(batch.target_ids) > left:
                groups.append([])
                left = room
            groups[-1].append((rows, batch))
            left -= len(batch.target_ids)
        return groups
