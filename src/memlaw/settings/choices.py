"""Values that settings may have: dtypes, engines, layers, objectives."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from memlaw.core.errors import ConfigError

EMBEDDED = "embedded"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # its weights, as the hub has them
DType = Literal["auto", "float32", "bfloat16", "float16"]
Decode = int | Literal["all", "none"]
EngineChoice = Literal["auto", "cached", "plain"]
Layers = tuple[int, ...] | Literal["auto", "all"]
Objective = Literal["triage", "sft", "memft_threshold", "memft_window", "memft_curriculum"]
OnEmpty = Literal["skip", "sft"]
VARIANTS = (  # objectives to compare; behind a colon: on_empty
    "sft",
    "memft_threshold",
    "memft_threshold:sft",
    "memft_window",
    "memft_curriculum",
    "triage",
)
ALIASES: dict[str, Objective] = {
    "only_threshold": "memft_threshold",
    "MemFT-OT": "memft_threshold",
    "sliding": "memft_window",
    "MemFT-SW": "memft_window",
}


def whole_path(spec: str) -> str:
    """What is a path here, from the root on; else (a hub id, say) as it is."""
    path = Path(spec).expanduser()
    return str(path.absolute()) if spec != EMBEDDED and path.exists() else spec


def portable_base(spec: str) -> str | None:
    """The hub id of a base model, by what it was asked for; None: it is a path on this machine."""
    if spec == EMBEDDED:
        return EMBEDDED_HUB_ID
    is_path = spec.count("/") > 1 or spec.startswith((".", "/", "~")) or Path(spec).exists()
    return None if is_path else spec


def check_template_args(given: tuple[str, ...] | None) -> None:
    """Raise ConfigError unless each is of the form NAME=VALUE."""
    for text in given or ():
        if not text.partition("=")[0].isidentifier() or "=" not in text:
            raise ConfigError(f"template_args '{text}': give NAME=VALUE, as enable_thinking=false.")


def resolve_objective(name: str) -> Objective:
    """The objective with this name or alias.

    Raises:
        ConfigError: there is none; the message lists all names.
    """
    if name in ALIASES:
        return ALIASES[name]
    if name in get_args(Objective):
        return name  # type: ignore[return-value]
    raise ConfigError(f"no objective '{name}'. There are {', '.join(get_args(Objective))}.")
