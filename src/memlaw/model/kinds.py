"""Which class of Transformers loads a model: by its config, before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memlaw.core.errors import ModelError


def auto_class(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """What `auto_class_of` gives for a folder with a `config.json`.

    Raises:
        ModelError: as there.
    """
    from transformers import AutoConfig

    return auto_class_of(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))


def auto_class_of(config: Any) -> Any:
    """`AutoModelForCausalLM`; for a model that also sees, `AutoModelForImageTextToText`.

    Raises:
        ModelError: a model that doesn't continue text: an encoder, or an encoder with a decoder.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"the model is a {config.model_type}: an encoder with a decoder, which answers a text "
            "instead of continuing it. Name a causal language model (decoder only)."
        )
    own = getattr(config, "auto_map", None)
    if own or type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if type(config) in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    raise ModelError(
        f"the model is a {config.model_type}, which Transformers has no causal language model for. "
        "Name a model that continues text."
    )
