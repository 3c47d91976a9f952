"""The laws of memory: from the cells of a probe to exponents, intervals and plans.

In: cells, from a probe's store or as flat rows. Out: fitted laws, plans. May import `core`; no
torch, so that a laptop without it fits and plans.
"""

from typing import TYPE_CHECKING

from memlaw.core.lazy import lazy_exports

if TYPE_CHECKING:
    from memlaw.law.fits import StoreFit as StoreFit
    from memlaw.law.fits import fit_store as fit_store
    from memlaw.law.memory_law import FORMS as FORMS
    from memlaw.law.memory_law import LawError as LawError
    from memlaw.law.memory_law import MemoryLaw as MemoryLaw
    from memlaw.law.memory_law import cell_arrays as cell_arrays
    from memlaw.law.memory_law import choose_cells as choose_cells
    from memlaw.law.memory_law import compare as compare
    from memlaw.law.memory_law import compare_cells as compare_cells
    from memlaw.law.plan import RankPlan as RankPlan
    from memlaw.law.plan import TokensPlan as TokensPlan
    from memlaw.law.plan import builtin_cells as builtin_cells
    from memlaw.law.plan import plan_rank as plan_rank
    from memlaw.law.plan import plan_tokens as plan_tokens
    from memlaw.law.recall_law import RecallLaw as RecallLaw
    from memlaw.law.recall_law import ShareLaw as ShareLaw
    from memlaw.law.recall_law import reached as reached
    from memlaw.law.store import CellStore as CellStore
    from memlaw.law.store import read_cells as read_cells

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "store": ["CellStore", "read_cells"],
        "memory_law": [
            "FORMS",
            "LawError",
            "MemoryLaw",
            "cell_arrays",
            "choose_cells",
            "compare",
            "compare_cells",
        ],
        "recall_law": ["RecallLaw", "ShareLaw", "reached"],
        "fits": ["StoreFit", "fit_store"],
        "plan": ["RankPlan", "TokensPlan", "builtin_cells", "plan_rank", "plan_tokens"],
    },
)
