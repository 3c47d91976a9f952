"""A base model with its weights in 8 or 4 bits, as people load it to save memory."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from memlaw.core.errors import ModelError
from memlaw.model.base import BaseModel
from memlaw.model.kinds import auto_class
from memlaw.model.locate import locate
from memlaw.settings.forms import Quantised

_NEEDS = "bitsandbytes"


def load_quantised(base: BaseModel, kind: Quantised, *, trust_remote_code: bool = False) -> Any:
    """The model of a loaded base model once more, quantised by bitsandbytes.

    Load an adapter before the first forward pass: on a CPU that pass packs 4-bit weights otherwise,
    and taking the state dict afterwards, as PEFT's loading does, leaves wrong ones behind.

    Args:
        base: the base model; its dtype is what is computed in.
        kind: int8 is LLM.int8(), nf4 QLoRA's 4 bits.
        trust_remote_code: as it was loaded with.

    Raises:
        ModelError: bitsandbytes isn't installed, or can't do it here.
    """
    if importlib.util.find_spec(_NEEDS) is None:
        raise ModelError(f"{_NEEDS} is not installed. Run pip install '.[quant]'.")
    from transformers import BitsAndBytesConfig

    logging.getLogger(_NEEDS).setLevel(logging.ERROR)  # it tells of each product's dtype

    how = {
        "int8": {"load_in_8bit": True},
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": base.model.dtype,
        },
    }[kind]
    folder, _ = locate(base.spec, lambda text: None)
    try:
        model = auto_class(folder, trust_remote_code=trust_remote_code).from_pretrained(
            folder,
            dtype=base.model.dtype,
            device_map=str(base.model.device),
            quantization_config=BitsAndBytesConfig(**how),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # whatever its kernels lack here
        raise ModelError(f"{_NEEDS} can't do {kind} here: {str(error)[:200]}") from error
    return model.requires_grad_(False).eval()
