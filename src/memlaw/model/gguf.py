"""Unpack a GGUF file, once, into a cached folder in Hugging Face's format."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from memlaw.core.errors import ModelError
from memlaw.core.files import cache_folder, file_sha256
from memlaw.core.first_time import once
from memlaw.model.hashes import weights_sha256

_LAYOUT = 1  # raised when the folder written for a GGUF file changes


def unpacked(gguf: Path, notice: Callable[[str], None]) -> Path:
    """A folder in Hugging Face's format with the weights of a GGUF file, made on first use.

    Weights are stored in float32, exactly as dequantised; `config.json` names bfloat16, so that
    plain `from_pretrained` computes in it. The folder is written under another name and renamed,
    and its hash is checked on every use: if it is incomplete or was altered, it is made again.

    Args:
        gguf: the file.
        notice: called with one sentence before unpacking, which takes about half a minute.

    Raises:
        ModelError: the file can't be read, or the folder can't be written.
    """
    key = file_sha256(gguf)
    folder = cache_folder() / "models" / f"{gguf.stem}-{key[:16]}-v{_LAYOUT}"
    seal = folder / "memlaw.json"
    if seal.is_file():
        with contextlib.suppress(OSError, ValueError, ModelError):
            if json.loads(seal.read_text())["weights_sha256"] == weights_sha256(folder):
                return folder
        notice(f"{folder} is damaged; making it anew.")
    notice(f"Unpacking {gguf.name} into {folder} (once; about half a minute).")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    try:
        with once():
            unpack(gguf, work)
        (work / "memlaw.json").write_text(
            json.dumps({"gguf_sha256": key, "weights_sha256": weights_sha256(work)}) + "\n"
        )
        if folder.exists():
            shutil.rmtree(folder)
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            os.rename(work, folder)
    except OSError as error:
        if not seal.is_file():  # else another process was first, and its folder serves
            raise ModelError(f"can't write {folder}: {error}. Set MEMLAW_CACHE.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def unpack(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model into an existing folder, in Hugging Face's format, in float32.

    Raises:
        ModelError: the file can't be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**names)
        model = AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32)
    except Exception as error:  # gguf and Transformers raise whatever a malformed header leads to
        raise ModelError(
            f"{gguf} can't be read as a GGUF model by Transformers: {error}"
        ) from error
    # What was loaded is dense; save_pretrained refuses it as long as it is marked as quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
