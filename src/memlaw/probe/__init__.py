"""`probe`: train a grid of adapters, and measure what each of them remembers.

In: settings of a grid, a folder's name. Out: cells in that folder, and comparisons of them. May
import everything below it, but not `writer`.
"""

from typing import TYPE_CHECKING

from memlaw.core.lazy import lazy_exports

if TYPE_CHECKING:
    from memlaw.core.observer import Spec as Spec
    from memlaw.probe.bench import ObjectivesResult as ObjectivesResult
    from memlaw.probe.bench import compare_objectives as compare_objectives
    from memlaw.probe.grid import NUMERICS as NUMERICS
    from memlaw.probe.prober import Prober as Prober
    from memlaw.probe.run import ProbeObserver as ProbeObserver
    from memlaw.probe.run import ProbeResult as ProbeResult
    from memlaw.probe.run import failed_cells as failed_cells
    from memlaw.probe.run import probe as probe
    from memlaw.probe.run import run_group as run_group
    from memlaw.probe.run import run_here as run_here
    from memlaw.probe.verify import verify_plan as verify_plan
    from memlaw.settings.probe import ProbeConfig as ProbeConfig

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "prober": ["Prober"],
        "grid": ["NUMERICS"],
        "run": ["ProbeObserver", "ProbeResult", "failed_cells", "probe", "run_group", "run_here"],
        "bench": ["ObjectivesResult", "compare_objectives"],
        "verify": ["verify_plan"],
        "memlaw.settings.probe": ["ProbeConfig"],
        "memlaw.core.observer": ["Spec"],
    },
)
