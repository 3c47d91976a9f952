"""Hashes of a base model's weights and tokenizer, by which a certificate identifies it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from memlaw.core.errors import MemlawError, ModelError
from memlaw.core.files import lfs_pointer


def weights_sha256(folder: Path) -> str:
    """Hash of all tensors in a folder's safetensors files: names, dtypes, shapes and bytes.

    The same for one file and for many shards.

    Raises:
        ModelError: there are none, or they can't be read.
    """
    digest = hashlib.sha256()
    for name, tensor in _stored_tensors(folder):
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _stored_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    try:
        if index.is_file():
            place = json.loads(index.read_text())["weight_map"]
        elif single.is_file():
            refuse_pointer(single)
            with safe_open(single, framework="pt") as file:
                place = dict.fromkeys(file.keys(), single.name)
        else:
            raise ModelError(
                f"{folder} has no model.safetensors. Pickled weights (.bin, .pt) are never "
                "loaded; convert them with save_pretrained in an environment you trust."
            )
        for name in sorted(set(place.values())):
            refuse_pointer(folder / name)
        with contextlib.ExitStack() as stack:
            shards = {
                name: stack.enter_context(safe_open(folder / name, framework="pt"))
                for name in sorted(set(place.values()))
            }
            for name in sorted(place):
                yield name, shards[place[name]].get_tensor(name)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise ModelError(f"{folder}: unreadable weights ({error}). Fetch them again.") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ModelError(f"{folder}: damaged weights ({error}). Fetch them again.") from error


def refuse_pointer(path: Path, kind: type[MemlawError] = ModelError) -> None:
    """Raise an error of this kind for a file that Git LFS hasn't fetched yet."""
    with path.open("rb") as file:
        if said := lfs_pointer(path, file.read(100)):
            raise kind(said)


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of a tokenizer and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    template = json.dumps(getattr(tokenizer, "chat_template", None))
    return hashlib.sha256(f"{content}\n{template}".encode()).hexdigest()
