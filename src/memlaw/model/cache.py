"""What a base model is found to say, kept on disk: made once, and used in each run.

Nothing there is needed: what is missing, damaged or can't be written is made again. What the
embedded model writes and answers for training comes with the package, in the same form.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from memlaw.core.errors import MemlawError
from memlaw.core.files import cache_folder, json_sha256, write_tensors
from memlaw.core.first_time import once
from memlaw.model.base import BaseModel

_LAYOUT = 1  # raised when what is kept changes


class Kept(NamedTuple):
    """What is kept of a base model.

    Attributes:
        content: JSON-able; comes back as JSON gives it, with lists for tuples.
        tensors: by name, on the CPU.
    """

    content: Any
    tensors: dict[str, torch.Tensor]


def kept(base: BaseModel, what: str, settings: Mapping[str, Any], make: Callable[[], Kept]) -> Kept:
    """What `make` gives, from the cache if it was made before with this base model.

    The first time, and from then on, it is the same: lists for tuples, tensors on the CPU.

    Args:
        base: its weights, tokenizer, dtype and kind of device are part of the key.
        what: a name for it: letters and hyphens.
        settings: all else that decides the result; JSON-able.
        make: makes it.
    """
    key = json_sha256(
        {
            "layout": _LAYOUT,
            "base": [base.sha256, base.tokenizer_sha256, base.dtype, base.model.device.type],
            "settings": settings,
        }
    )
    name = Path(base.sha256[:16]) / f"{what}-{key[:32]}.safetensors"
    path = cache_folder() / "said" / name
    packaged = importlib.resources.files("memlaw.model") / "said"
    for place in (path, Path(str(packaged)) / name):
        if (found := _read(place)) is not None:
            return found
    with once() as done:
        content, tensors = make()
        text = json.dumps(content)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, tensors, {"content": text, "sha256": _sha256(text, tensors)})
        except (OSError, MemlawError):  # a full disk, a folder that isn't ours
            done.kept = False
    return Kept(json.loads(text), tensors)


def _read(path: Path) -> Kept | None:
    """What a file of the cache holds; None if it isn't there or is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            # Copies: a file's own memory is aligned otherwise, and so products would be rounded.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if metadata["sha256"] != _sha256(metadata["content"], tensors):
            return None
        return Kept(json.loads(metadata["content"]), tensors)
    except (OSError, RuntimeError, SafetensorError, KeyError, TypeError, ValueError):
        return None  # RuntimeError: torch can't open or map it


def _sha256(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        found.update(f"\n{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        found.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
