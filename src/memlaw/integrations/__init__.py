"""MemFT, audits and certificates for people who keep their own trainer.

In: a Transformers or TRL trainer, records. Out: a trainer that trains with MemFT's objectives, and
a folder with the adapter that it trained and a certificate. May import all but `writer`, `probe`,
`shards`, `report` and `cli`. `memlaw.integrations.trl` needs the extra `trl`.
"""

from typing import TYPE_CHECKING

from memlaw.core.lazy import lazy_exports

if TYPE_CHECKING:
    from memlaw.integrations.memft import MemFT as MemFT
    from memlaw.integrations.recall import RecallCallback as RecallCallback
    from memlaw.integrations.trained import training_rows as training_rows

__getattr__, __dir__ = lazy_exports(
    __name__,
    {"memft": ["MemFT"], "recall": ["RecallCallback"], "trained": ["training_rows"]},
)
