"""Names that a package offers, loaded when they are first used: importing it costs nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_exports(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__` (PEP 562).

    Args:
        package: its `__name__`.
        names: for each module, named from the package on or in full, what the package offers of it.
    """
    home = {
        name: module if module.startswith("memlaw.") else f"{package}.{module}"
        for module, offered in names.items()
        for name in offered
    }

    def load(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home[name]), name)

    return load, lambda: sorted({*home, *vars(sys.modules[package])})
