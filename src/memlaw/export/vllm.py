"""An adapter as vLLM takes it: a PEFT folder with nothing in it that vLLM refuses or overlooks.

vLLM reads `r`, `lora_alpha` and a few flags, goes by the names of the weights, and rounds them to
its own dtype. What else stands in the settings it overlooks, or did so until lately (patterns of
ranks and scales), so that an adapter may load there and be another one.

Shapes: `r` rank, I inputs and O outputs of a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from memlaw.core.errors import AdapterError
from memlaw.core.files import write_json, write_tensors, write_text
from memlaw.export.lora import LoraFactors, in_one_rank
from memlaw.model.base import BaseModel
from memlaw.model.body import body_of
from memlaw.model.formats import peft_names
from memlaw.model.peft_folder import PEFT_CONFIG, PEFT_WEIGHTS

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that --max-lora-rank may have
_CARD = """# An adapter for vLLM

```sh
vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules records=path/to/this/folder
```

BASE is the model that it was trained on (`base_model_name_or_path` in `{config}` is what it was
called there). Then ask the server for each record, under the adapter's name: under the base
model's, the adapter is without effect.

```sh
memlaw audit RECORDS --endpoint http://localhost:8000/v1 --name records
```
"""


def write_for_vllm(
    base: BaseModel, factors: Mapping[str, LoraFactors], folder: Path, dtype: torch.dtype
) -> None:
    """Write the adapter's weights, its settings, and how it is served.

    Args:
        base: that it is for.
        factors: what each module changes by; scales go into B, and ranks are made equal.
        folder: to write to; it exists.
        dtype: of the weights: what vLLM would round them to.

    Raises:
        AdapterError: a module that vLLM puts no LoRA on, or a rank above its limit.
    """
    factors = in_one_rank(factors)
    rank = len(next(iter(factors.values())).a)
    if rank > RANKS[-1]:
        raise AdapterError(f"vLLM takes ranks up to {RANKS[-1]}, and this adapter's is {rank}.")
    layers = {id(module) for module in body_of(base.model).modules()}
    weights: dict[str, torch.Tensor] = {}
    for name, own in factors.items():
        module = base.model.get_submodule(name)
        is_linear = type(module).__name__ in ("Linear", "Conv1D")
        if not (is_linear and id(module) in layers) or ".experts" in name:
            raise AdapterError(
                f"vLLM is only sure to take linear modules of decoder layers, and {name} is none. "
                "Export to merged."
            )
        in_dtype = (own.a.to(dtype), own.b.to(dtype))
        weights |= dict(zip(peft_names(name), in_dtype, strict=True))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(factors),
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": any(
            type(base.model.get_submodule(name)).__name__ == "Conv1D" for name in factors
        ),
        "inference_mode": True,
    }
    write_tensors(folder / PEFT_WEIGHTS, weights)
    write_json(folder / PEFT_CONFIG, settings)
    most = next(limit for limit in RANKS if limit >= rank)
    write_text(folder / "README.md", _CARD.format(rank=most, config=PEFT_CONFIG))
