"""The commands that a page shows of a run: measure it again, ask it, make it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from memlaw.core.files import CERTIFICATE_FILE
from memlaw.report.run_view import RunView, config_of
from memlaw.settings.given import as_arguments
from memlaw.settings.write import WriteConfig

_OF_THE_MACHINE = ("resume", "device", "cache_mb", "logits_mb")  # where a run was, not what


def commands(view: RunView) -> list[tuple[str, str]]:
    """For each command what it does and its text; none where there is no certificate."""
    if view.certificate is None:
        return []
    certificate = shlex.quote(f"{view.name}/{CERTIFICATE_FILE}")
    found = [
        ("Measure it again", f"memlaw audit RECORDS --certificate {certificate}"),
        ("Let it recite", f"memlaw ask {shlex.quote(view.name)} PROMPT"),
    ]
    if view.run:
        words = ["memlaw", "write", "RECORDS", "-o", "FOLDER", *flags(config_of(view))]
        found.append(("Make it again", shlex.join(words)))
    return found


def flags(config: Mapping[str, Any]) -> list[str]:
    """The arguments of `memlaw write` that give a run's settings again.

    Args:
        config: settings by name, as `run.json` has them. Unknown ones and those that have their
            default value are left out, and so are those that say where the run was, not what.
    """
    found: list[str] = []
    for setting in fields(WriteConfig):
        value = config.get(setting.name)
        value = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
        if value not in (None, setting.default) and setting.name not in _OF_THE_MACHINE:
            found += as_arguments(setting.name, value)
    return found
