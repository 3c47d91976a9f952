"""MemFT and the audit for users of Transformers' plain Trainer."""

from __future__ import annotations

from transformers import Trainer

from memlaw.integrations.memft import MemFT
from memlaw.integrations.recall import RecallCallback as RecallCallback
from memlaw.integrations.trained import training_rows as training_rows


class MemFTTrainer(MemFT, Trainer):
    """Transformers' `Trainer` with MemFT's loss, computed from logits; see `MemFT`.

    Batches need `labels`, -100 wherever nothing is to be learnt: the prompt and pads.
    """
