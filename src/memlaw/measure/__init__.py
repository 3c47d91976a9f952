"""What a model recalls and what an adapter has harmed: measured, never trained.

In: a model, with or without an adapter, and examples or texts. Out: `Audit`s and their files,
`Damage`, answers. May import `core`, `data`, `settings` and `model`. `table` and `files` need no
torch.
"""

from typing import TYPE_CHECKING

from memlaw.core.lazy import lazy_exports

if TYPE_CHECKING:
    from memlaw.measure.asking import Answer as Answer
    from memlaw.measure.asking import ask as ask
    from memlaw.measure.damage import Damage as Damage
    from memlaw.measure.damage import measure_damage as measure_damage
    from memlaw.measure.decode import greedy_decode as greedy_decode
    from memlaw.measure.examine import Audit as Audit
    from memlaw.measure.examine import audit_examples as audit_examples
    from memlaw.measure.files import SavedAudit as SavedAudit
    from memlaw.measure.session import audit as audit
    from memlaw.measure.table import RecordVerdict as RecordVerdict
    from memlaw.measure.table import TokenTable as TokenTable

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "table": ["RecordVerdict", "TokenTable"],
        "files": ["SavedAudit"],
        "examine": ["Audit", "audit_examples"],
        "decode": ["greedy_decode"],
        "damage": ["Damage", "measure_damage"],
        "asking": ["Answer", "ask"],
        "session": ["audit"],
    },
)
