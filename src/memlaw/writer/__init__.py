"""`write`: train until the certificate holds, and hand over a folder.

In: records, settings, a folder's name. Out: the folder, with adapter, certificate and model card.
May import everything below it, but not `probe`.
"""

from typing import TYPE_CHECKING

from memlaw.core.lazy import lazy_exports

if TYPE_CHECKING:
    from memlaw.core.observer import Observer as Observer
    from memlaw.writer.changes import Changes as Changes
    from memlaw.writer.history import log as log
    from memlaw.writer.history import revert as revert
    from memlaw.writer.result import WriteResult as WriteResult
    from memlaw.writer.run import write as write
    from memlaw.writer.updating import UpdateResult as UpdateResult
    from memlaw.writer.updating import update as update

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "changes": ["Changes"],
        "history": ["log", "revert"],
        "result": ["WriteResult"],
        "run": ["write"],
        "updating": ["UpdateResult", "update"],
        "memlaw.core.observer": ["Observer"],
    },
)
