"""The laws of memory: from the cells of a probe to exponents, intervals and plans.

In: cells, from a probe's store or as flat rows. Out: fitted laws, plans. May import `core`; no
torch, so that a laptop without it fits and plans.

The store gives rows (`store`, `rows`). The memory law is a form (`forms`) and its likelihood
(`search_space`, `likelihood`), a maximum (`optimum`), intervals (`profile_likelihood`,
`identifiability`), and the estimator on top (`memory_law`, `comparison`). The recall law
(`recall_posterior`, `recall_law`) is what plans go by (`plan`, `builtin`). `fits` has all laws of a
store.
"""

from typing import TYPE_CHECKING

from memlaw.core.lazy import lazy_exports

if TYPE_CHECKING:
    from memlaw.law.builtin import BUILTIN as BUILTIN
    from memlaw.law.builtin import builtin_cells as builtin_cells
    from memlaw.law.builtin import plan_by_builtin as plan_by_builtin
    from memlaw.law.comparison import FormResult as FormResult
    from memlaw.law.comparison import compare as compare
    from memlaw.law.comparison import compare_cells as compare_cells
    from memlaw.law.estimator import Estimator as Estimator
    from memlaw.law.estimator import LawError as LawError
    from memlaw.law.estimator import checked_rows as checked_rows
    from memlaw.law.fits import GridPoint as GridPoint
    from memlaw.law.fits import StoreFit as StoreFit
    from memlaw.law.fits import fit_store as fit_store
    from memlaw.law.forms import FORMS as FORMS
    from memlaw.law.forms import Form as Form
    from memlaw.law.identifiability import Identifiability as Identifiability
    from memlaw.law.memory_law import MemoryLaw as MemoryLaw
    from memlaw.law.plan import RankPlan as RankPlan
    from memlaw.law.plan import TokensPlan as TokensPlan
    from memlaw.law.plan import goal_text as goal_text
    from memlaw.law.plan import plan_rank as plan_rank
    from memlaw.law.plan import plan_tokens as plan_tokens
    from memlaw.law.recall_law import Measure as Measure
    from memlaw.law.recall_law import RecallLaw as RecallLaw
    from memlaw.law.recall_law import reached as reached
    from memlaw.law.recall_posterior import BEND_PRIOR as BEND_PRIOR
    from memlaw.law.recall_posterior import GAMMA_PRIOR as GAMMA_PRIOR
    from memlaw.law.recall_posterior import SLIP as SLIP
    from memlaw.law.recall_posterior import SPREAD_PRIOR as SPREAD_PRIOR
    from memlaw.law.rows import SETTING_COLUMNS as SETTING_COLUMNS
    from memlaw.law.rows import CellRow as CellRow
    from memlaw.law.rows import Covariate as Covariate
    from memlaw.law.rows import cell_arrays as cell_arrays
    from memlaw.law.rows import choose_cells as choose_cells
    from memlaw.law.rows import data_key as data_key
    from memlaw.law.rows import finished_cells as finished_cells
    from memlaw.law.rows import number as number
    from memlaw.law.rows import split_by_setting as split_by_setting
    from memlaw.law.share_law import ShareLaw as ShareLaw
    from memlaw.law.store import CellStore as CellStore
    from memlaw.law.store import read_cells as read_cells

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "builtin": ["BUILTIN", "builtin_cells", "plan_by_builtin"],
        "comparison": ["FormResult", "compare", "compare_cells"],
        "estimator": ["Estimator", "LawError", "checked_rows"],
        "fits": ["GridPoint", "StoreFit", "fit_store"],
        "forms": ["FORMS", "Form"],
        "identifiability": ["Identifiability"],
        "memory_law": ["MemoryLaw"],
        "plan": ["RankPlan", "TokensPlan", "goal_text", "plan_rank", "plan_tokens"],
        "recall_law": ["Measure", "RecallLaw", "reached"],
        "recall_posterior": ["BEND_PRIOR", "GAMMA_PRIOR", "SLIP", "SPREAD_PRIOR"],
        "rows": [
            "SETTING_COLUMNS",
            "CellRow",
            "Covariate",
            "cell_arrays",
            "choose_cells",
            "data_key",
            "finished_cells",
            "number",
            "split_by_setting",
        ],
        "share_law": ["ShareLaw"],
        "store": ["CellStore", "read_cells"],
    },
)
