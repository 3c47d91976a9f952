"""A plain LoRA as numbers: what each adapted module's weight changes by.

Shapes: `r` rank, I inputs and O outputs of a module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from memlaw.core.errors import AdapterError
from memlaw.core.files import read_json
from memlaw.model.formats import adapter_config_file, peft_modules, peft_names
from memlaw.model.peft_folder import PEFT_CONFIG, PEFT_WEIGHTS

# Settings of PEFT's LoRA by which the weight's change is another than scale · B A.
_OTHERWISE = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "modules_to_save",
    "trainable_token_indices",
    "lora_bias",
    "alora_invocation_tokens",
    "exclude_modules",
    "layer_replication",
    "target_parameters",
)
# Ways to begin that leave the base model's weights alone. With others (PiSSA, OLoRA, CorDA, LoftQ)
# PEFT changes them each time it loads the adapter.
_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class LoraFactors:
    """What one module's weight [O, I] changes by: `scale · B A`.

    Attributes:
        a: [r, I] float32.
        b: [O, r] float32.
        scale: alpha / r, or alpha / √r where it is rank-stabilised.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def delta(self) -> torch.Tensor:
        """[O, I] float32."""
        return self.scale * (self.b @ self.a)


def lora_factors(folder: Path) -> dict[str, LoraFactors]:
    """The factors of each adapted module, by its name in the base model.

    Raises:
        AdapterError: it is no PEFT LoRA, or one that adds more than `scale · B A` to weights.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder. Name the folder that holds the adapter.")
    if adapter_config_file(folder).name != PEFT_CONFIG:
        raise AdapterError(
            f"{folder} has no {PEFT_CONFIG}: only a PEFT LoRA can be exported. memlaw's placement "
            "mlp sits beside a whole block, and no weight can take it in: write the adapter with "
            "a module as its placement."
        )
    config = read_json(folder / PEFT_CONFIG, AdapterError, "Fetch or make it again.")
    if str(config.get("peft_type")).upper() != "LORA":
        raise AdapterError(f"{folder} is of the kind {config.get('peft_type')}, not a LoRA.")
    found = [name for name in _OTHERWISE if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append("bias")
    begun = config.get("init_lora_weights", True)
    if isinstance(begun, str) and begun.lower() not in _BEGINNINGS:
        raise AdapterError(
            f"{folder} can't be exported: with init_lora_weights={begun!r} PEFT changes the base "
            "model's weights, too, when it loads the adapter. Save it again as a plain LoRA: "
            "save_pretrained with path_initial_model_for_weight_conversion."
        )
    if found:
        active = " An activated adapter, merged, would be active everywhere."
        raise AdapterError(
            f"{folder} can't be exported: its {', '.join(found)} can't be put into weights as "
            f"scale · B A.{active if 'alora_invocation_tokens' in found else ''}"
        )
    weights = load_file(folder / PEFT_WEIGHTS)
    names = {module: peft_names(module) for module in peft_modules(weights)}
    wanted = {name for pair in names.values() for name in pair}
    if not names or set(weights) != wanted:
        odd = sorted(set(weights) ^ wanted)
        raise AdapterError(
            f"{folder / PEFT_WEIGHTS} holds other weights than a LoRA's: {', '.join(odd[:3])}."
        )
    return {
        module: LoraFactors(
            a=weights[a].float(),
            b=weights[b].float(),
            scale=_scale(config, module, len(weights[a])),
        )
        for module, (a, b) in names.items()
    }


def in_one_rank(factors: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
    """The same changes with one rank for all and a scale of 1: B has it, zeros fill what lacks.

    For readers that know one rank and one scale.
    """
    rank = max(len(own.a) for own in factors.values())
    return {
        module: LoraFactors(
            a=F.pad(own.a, (0, 0, 0, rank - len(own.a))),
            b=F.pad(own.scale * own.b, (0, rank - len(own.a))),
            scale=1.0,
        )
        for module, own in factors.items()
    }


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies a module's B A by."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, module), config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
