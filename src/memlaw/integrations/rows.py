"""The target tokens of a trainer's batch, record by record, wherever in its rows they lie.

Shapes: B rows of S tokens; N target tokens of R records, record after record; T of the longest one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label of a position that isn't trained


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Which tokens of a batch are trained, and to which record each belongs.

    Attributes:
        keep: [B, S − 1] bool: the position predicts a target token.
        token_ids: [N] int64: the target tokens, in the order of `keep`'s true places.
        mask: [R, T] bool: the same tokens with a row for each record.
    """

    keep: Tensor
    token_ids: Tensor
    mask: Tensor
    _record: Tensor  # [N]: number of the record
    _place: Tensor  # [B, S]: the record that each position belongs to, unique in the batch
    _inputs: Mapping[str, Any]

    def record_ids(self) -> list[str]:
        """R names of the records: hashes of their tokens, the same in each batch and process."""
        ids, real = self._inputs["input_ids"], self._inputs.get("attention_mask")
        at_target = self._place[:, 1:][self.keep]
        names = []
        for number in range(len(self.mask)):
            own = self._place == at_target[self._record == number][0]
            if real is not None:
                own &= real.bool()
            tokens = ids[own].to("cpu", torch.int64).numpy().tobytes()
            names.append(hashlib.sha256(tokens).hexdigest()[:32])
        return names


def targets(inputs: Mapping[str, Any]) -> Targets:
    """Find the target tokens of a batch.

    A row is a record, unless it has position ids that begin anew within it, as packed and
    padding-free rows do: then each stretch is one.

    Args:
        inputs: what a collator gives: `input_ids` and `labels` [B, S], and `position_ids` [B, S] if
            there are any. Labels are not shifted.
    """
    labels = inputs["labels"]
    begins = torch.zeros_like(labels)
    positions = inputs.get("position_ids")
    if positions is not None:
        begins = (positions.expand_as(labels) == 0).long()
    begins[:, 0] = 1
    place = begins.flatten().cumsum(0).view_as(labels)
    keep = labels[:, 1:] != IGNORED
    keep &= place[:, 1:] == place[:, :-1]  # nothing before a record's first token predicts it
    at_target = place[:, 1:][keep]
    _, record, counts = at_target.unique_consecutive(return_inverse=True, return_counts=True)
    width = int(counts.max()) if len(counts) else 0
    return Targets(
        keep=keep,
        token_ids=labels[:, 1:][keep],
        mask=torch.arange(width, device=labels.device) < counts[:, None],
        _record=record,
        _place=place,
        _inputs=inputs,
    )
