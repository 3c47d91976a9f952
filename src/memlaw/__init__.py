"""memlaw: write records into a language model word for word, and prove it.

The names below are loaded when they are first used, so that `import memlaw` costs nothing. The
packages beneath stand in the order in which data go through them; each says what it takes, what it
gives, and what it may import:

    core, data, settings, law, model, measure, train, certify, export,
    writer, probe and integrations, shards, report, cli
"""

from typing import TYPE_CHECKING

from memlaw.core import moved
from memlaw.core.lazy import lazy_exports

__version__ = "0.1.0"
moved.install()

if TYPE_CHECKING:
    from memlaw.certify.check import check_certificate
    from memlaw.certify.folder import certify_adapter
    from memlaw.core.errors import MemlawError
    from memlaw.core.observer import Observer
    from memlaw.data.reading import read_records
    from memlaw.data.record import Record
    from memlaw.measure.session import audit
    from memlaw.settings.write import WriteConfig
    from memlaw.shards.asking import ask
    from memlaw.shards.checking import check_shards
    from memlaw.shards.diffing import diff
    from memlaw.shards.loading import load
    from memlaw.shards.updating import update_shards
    from memlaw.shards.writing import write_shards
    from memlaw.writer.history import log, revert
    from memlaw.writer.result import WriteResult
    from memlaw.writer.run import write
    from memlaw.writer.updating import update

__all__ = [
    "MemlawError",
    "Observer",
    "Record",
    "WriteConfig",
    "WriteResult",
    "ask",
    "audit",
    "certify_adapter",
    "check_certificate",
    "check_shards",
    "diff",
    "load",
    "log",
    "read_records",
    "revert",
    "update",
    "update_shards",
    "write",
    "write_shards",
]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "core.errors": ["MemlawError"],
        "core.observer": ["Observer"],
        "certify.check": ["check_certificate"],
        "certify.folder": ["certify_adapter"],
        "data.reading": ["read_records"],
        "data.record": ["Record"],
        "measure.session": ["audit"],
        "settings.write": ["WriteConfig"],
        "shards.asking": ["ask"],
        "shards.checking": ["check_shards"],
        "shards.diffing": ["diff"],
        "shards.loading": ["load"],
        "shards.updating": ["update_shards"],
        "shards.writing": ["write_shards"],
        "writer.history": ["log", "revert"],
        "writer.result": ["WriteResult"],
        "writer.run": ["write"],
        "writer.updating": ["update"],
    },
)
