"""Training: objectives say what counts, engines run the model, learners move the weights.

In: a model, sites, examples, settings. Out: adapters that were trained, and what training saw of
each token. May import `core`, `data`, `settings`, `model` and `measure`.
"""

from typing import TYPE_CHECKING

from memlaw.core.lazy import lazy_exports

if TYPE_CHECKING:
    from memlaw.train.cached import CachedEngine as CachedEngine
    from memlaw.train.engine import Engine as Engine
    from memlaw.train.engine import Job as Job
    from memlaw.train.engine import PlainEngine as PlainEngine
    from memlaw.train.learner import DivergedError as DivergedError
    from memlaw.train.learner import Learner as Learner
    from memlaw.train.preparation import Preparation as Preparation
    from memlaw.train.preparation import make_engine as make_engine
    from memlaw.train.preparation import prepare as prepare
    from memlaw.train.snapshots import Snapshots as Snapshots
    from memlaw.train.trainer import AdapterBank as AdapterBank

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "trainer": ["AdapterBank"],
        "learner": ["DivergedError", "Learner"],
        "engine": ["Engine", "Job", "PlainEngine"],
        "cached": ["CachedEngine"],
        "preparation": ["Preparation", "make_engine", "prepare"],
        "snapshots": ["Snapshots"],
    },
)
