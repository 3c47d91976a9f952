"""How a folder's generations are called wherever they are listed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def generation_name(line: Mapping[str, Any]) -> str:
    """A generation's number, and how it came about where that isn't by a change of the one before.

    Args:
        line: of `generations` in `run.json`.
    """
    if "reverted_to" in line:
        return f"{line['number']} (again {line['reverted_to']})"
    return f"{line['number']}{' (anew)' if line.get('anew') and line['number'] > 1 else ''}"
