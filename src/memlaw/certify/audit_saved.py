"""The audit that a certificate rests on: of the adapter as a user will have it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from memlaw.data.record import Example
from memlaw.measure.examine import Audit, audit_examples
from memlaw.model.adapter import Adapter
from memlaw.model.base import BaseModel
from memlaw.model.formats import loaded_adapter, save_adapter


def audit_as_saved(
    adapter: Adapter,
    base: BaseModel,
    examples: Sequence[Example],
    *,
    threshold: float,
    margin: float,
    batch_size: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Audit:
    """Save the adapter to a folder, load it from there as a user would, and audit it, all decoded.

    So a fault in what trained it can cost time, never a false certificate.

    Args:
        adapter: as training has it.
        base: what it was trained on.
        examples, threshold, margin, batch_size, progress: see `audit_examples`.
    """
    with tempfile.TemporaryDirectory(prefix="memlaw-") as name:
        folder = Path(name)
        save_adapter(adapter, folder, base_path=base.name, base_sha256=base.sha256)
        with loaded_adapter(folder, base.model) as model:
            return audit_examples(
                model,
                base.tokenizer,
                examples,
                threshold=threshold,
                margin=margin,
                batch_size=batch_size,
                progress=progress,
            )
