"""Where a result comes from: the versions of what computed it, and the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

from memlaw.model.threads import most_threads


def versions() -> dict[str, str]:
    """Versions of this package and of what its results depend on."""
    names = ("memlaw", "torch", "transformers", "peft", "tokenizers", "safetensors")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def machine() -> dict[str, Any]:
    """Platform, CPUs, and the threads that PyTorch takes where nothing else runs."""
    return {
        "platform": platform.platform(),
        "n_cpus": os.cpu_count(),
        "n_threads": most_threads(),
    }
