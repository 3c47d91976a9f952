"""Training: objectives say what counts, engines run the model, learners move the weights.

In: a model, sites, examples, settings. Out: adapters that were trained, and what training saw of
each token. May import `core`, `data`, `settings`, `model` and `measure`.
"""

from typing import TYPE_CHECKING

from memlaw.core.lazy import lazy_exports

if TYPE_CHECKING:
    from memlaw.train.cached import CachedEngine as CachedEngine
    from memlaw.train.cached import cached_or_plain as cached_or_plain
    from memlaw.train.engine import Engine as Engine
    from memlaw.train.engine import Job as Job
    from memlaw.train.engine import PlainEngine as PlainEngine
    from memlaw.train.learner import DivergedError as DivergedError
    from memlaw.train.learner import Learner as Learner
    from memlaw.train.snapshots import Snapshots as Snapshots
    from memlaw.train.trainer import AdapterBank as AdapterBank

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "trainer": ["AdapterBank"],
        "learner": ["DivergedError", "Learner"],
        "engine": ["Engine", "Job", "PlainEngine"],
        "cached": ["CachedEngine", "cached_or_plain"],
        "snapshots": ["Snapshots"],
    },
)
