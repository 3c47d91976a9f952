"""A plain LoRA as numbers: what each adapted module's weight changes by.

Shapes: `r` rank, I inputs and O outputs of a module.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from memlaw.core.errors import AdapterError
from memlaw.core.files import read_json
from memlaw.model.formats import adapter_config_file, peft_modules, peft_names
from memlaw.model.peft_folder import PEFT_CONFIG, PEFT_WEIGHTS

# Settings of PEFT's LoRA by which the weight's change is another than scale · B A.
_OTHERWISE = (
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "lora_bias",
    "alora_invocation_tokens",
    "exclude_modules",
    "layer_replication",
    "target_parameters",
)


@dataclass(frozen=True, kw_only=True)
class LoraFactors:
    """What one module's weight [O, I] changes by: `scale · B A`.

    Attributes:
        a: [r, I] float32.
        b: [O, r] float32.
        scale: alpha / r.
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
            a=weights[a].float(), b=weights[b].float(), scale=config["lora_alpha"] / config["r"]
        )
        for module, (a, b) in names.items()
    }
