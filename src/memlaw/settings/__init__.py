"""The settings of each command: frozen dataclasses, checked when they are made.

In: what a user gives, by name. Out: settings that are in range. May import `core` and `data`; no
torch, so that a command's help costs nothing.
"""

from typing import TYPE_CHECKING

from memlaw.core.lazy import lazy_exports

if TYPE_CHECKING:
    from memlaw.settings.audit import AuditConfig as AuditConfig
    from memlaw.settings.choices import EMBEDDED as EMBEDDED
    from memlaw.settings.probe import ProbeConfig as ProbeConfig
    from memlaw.settings.train import TrainConfig as TrainConfig
    from memlaw.settings.write import FREE_TO_CHANGE as FREE_TO_CHANGE
    from memlaw.settings.write import WriteConfig as WriteConfig

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "choices": ["EMBEDDED"],
        "train": ["TrainConfig"],
        "write": ["FREE_TO_CHANGE", "WriteConfig"],
        "audit": ["AuditConfig"],
        "probe": ["ProbeConfig"],
    },
)
