"""memlaw: write records into a language model word for word, and prove it.

The names below are loaded when they are first used, so that `import memlaw` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from memlaw.check import ask, audit, check_certificate
    from memlaw.errors import MemlawError
    from memlaw.records import Record, read_records
    from memlaw.settings import WriteConfig
    from memlaw.writer import Observer, WriteResult, write

_HOME = {
    "MemlawError": "errors",
    "Observer": "writer",
    "Record": "records",
    "WriteConfig": "settings",
    "WriteResult": "writer",
    "ask": "check",
    "audit": "check",
    "check_certificate": "check",
    "read_records": "records",
    "write": "writer",
}
__all__ = [
    "MemlawError",
    "Observer",
    "Record",
    "WriteConfig",
    "WriteResult",
    "ask",
    "audit",
    "check_certificate",
    "read_records",
    "write",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'memlaw' has no attribute {name!r}")
    return getattr(importlib.import_module(f"memlaw.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
