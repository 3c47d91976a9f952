"""How far down a saved adapter reaches: what is below it is the base model's, and known."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from memlaw.core.errors import AdapterError
from memlaw.core.files import read_json
from memlaw.model.formats import FORMATS, AdapterFormat, adapter_shapes
from memlaw.model.peft_folder import PEFT_CONFIG
from memlaw.model.sites import decoder_layers

# Of PEFT's settings those that do more than to add to the outputs of the modules that have weights.
_MORE = ("layer_replication", "trainable_token_indices", "modules_to_save", "arrow_config")


def lowest_layer(folder: Path, model: nn.Module) -> int:
    """The lowest decoder layer that a saved adapter changes; 0 where that isn't certain.

    Certain is what the weights file says of a plain LoRA: its layers are those of the modules that
    it has an A and a B for. What a run has on record of itself isn't asked.

    Args:
        folder: of the adapter.
        model: the base model, without an adapter.
    """
    format = next((f for f in FORMATS if (folder / f.config_file).is_file()), None)
    try:
        if format is None or not _only_adds(folder, format):
            return 0
        modules = _adapted(format, adapter_shapes(folder))
        name, layers = decoder_layers(model)
    except (AdapterError, SafetensorError, OSError, ValueError):
        return 0  # whoever loads it says what is wrong
    found = []
    for module in modules:
        place, _, rest = module.removeprefix(f"{name}.").partition(".")
        if not (module.startswith(f"{name}.") and place.isdecimal() and rest):
            return 0  # somewhere else: an embedding, the head
        found.append(int(place))
    lowest = min(found, default=0)
    below = {id(part) for layer in layers[:lowest] for part in layer.modules()}
    above = {id(part) for layer in layers[lowest:] for part in layer.modules()}
    return 0 if below & above else lowest  # a module that several layers share is in all of them


def _only_adds(folder: Path, format: AdapterFormat) -> bool:
    if format.config_file != PEFT_CONFIG:
        return True
    config = read_json(folder / PEFT_CONFIG, AdapterError, "Fetch or make it again.")
    is_lora = str(config.get("peft_type")).upper() == "LORA"
    starts_plainly = config.get("init_lora_weights") in (True, False, None, "gaussian")
    return is_lora and starts_plainly and not any(config.get(name) for name in _MORE)


def _adapted(format: AdapterFormat, names: Iterable[str]) -> list[str]:
    """The modules that weights are of; empty if any are of something else than an A or a B."""
    names = set(names)
    before, after = format.names("/")[0].split("/")
    modules = [
        name.removeprefix(before).removesuffix(after)
        for name in names
        if name.startswith(before) and name.endswith(after)
    ]
    return modules if names == {n for module in modules for n in format.names(module)} else []
