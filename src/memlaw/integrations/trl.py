"""MemFT and the audit for users of TRL's SFTTrainer: three lines to a certificate.

trainer = MemFTTrainer(model, args=args, train_dataset=dataset, peft_config=lora)
trainer.add_callback(RecallCallback(trainer, records))
trainer.train()
"""

from __future__ import annotations

from memlaw.core.errors import ConfigError

try:
    import trl
    from trl import SFTTrainer
except ImportError as error:  # pragma: no cover
    raise ConfigError(f"TRL can't be imported ({error}). Install memlaw's extra trl.") from error

from memlaw.integrations.memft import MemFT
from memlaw.integrations.recall import RecallCallback as RecallCallback
from memlaw.integrations.trained import training_rows as training_rows


class MemFTTrainer(MemFT, SFTTrainer):
    """TRL's `SFTTrainer` with MemFT's loss: everything else is as it was; see `MemFT`.

    Token losses come from TRL's fused head, without the logits, where this TRL has it.
    """

    fused = hasattr(trl.trainer.utils, "add_fused_lm_head")
