"""What a model recalls and what an adapter has harmed: measured, never trained.

In: a model, with or without an adapter, and examples or texts. Out: `Audit`s, `Damage`, answers.
May import `core`, `data`, `settings` and `model`.
"""

from typing import TYPE_CHECKING

from memlaw.core.lazy import lazy_exports

if TYPE_CHECKING:
    from memlaw.measure.damage import Damage as Damage
    from memlaw.measure.damage import measure_damage as measure_damage
    from memlaw.measure.recall import Audit as Audit
    from memlaw.measure.recall import RecordVerdict as RecordVerdict
    from memlaw.measure.recall import TokenTable as TokenTable
    from memlaw.measure.recall import audit_examples as audit_examples
    from memlaw.measure.recall import greedy_decode as greedy_decode
    from memlaw.measure.session import Answer as Answer
    from memlaw.measure.session import ask as ask
    from memlaw.measure.session import audit as audit

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "recall": ["Audit", "RecordVerdict", "TokenTable", "audit_examples", "greedy_decode"],
        "damage": ["Damage", "measure_damage"],
        "session": ["Answer", "ask", "audit"],
    },
)
