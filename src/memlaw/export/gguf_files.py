"""GGUF files: a base model's with merged weights, and an adapter's; written, and read back.

Shapes: as in `lora.py`. llama.cpp keeps the rows of Llama's query and key weights in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from memlaw.core.errors import AdapterError, ModelError
from memlaw.export.lora import LoraFactors, in_one_rank
from memlaw.settings.export import GgufType

_TYPES: dict[GgufType, Any] = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
# Transformers' name of an architecture, where llama.cpp's is another.
_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "phi": "phi2"}
_REORDERED = ("attn_q.weight", "attn_k.weight")


def as_stored(weight: torch.Tensor, kind: GgufType) -> torch.Tensor:
    """What a weight [O, I] float32 is after it was stored as this type and read again.

    Raises:
        AdapterError: its rows can't be stored so.
    """
    type = _TYPES[kind]
    try:
        stored = gguf.quants.quantize(weight.cpu().numpy(), type)
    except (ValueError, gguf.quants.QuantError) as error:
        raise AdapterError(f"rows of {weight.shape[1]} can't be {kind}: {error}.") from error
    return torch.from_numpy(gguf.quants.dequantize(stored, type)).to(weight.device)


class TensorNames:
    """What llama.cpp calls the weights of a model, and how it orders them.

    Args:
        config: the model's, Transformers'.

    Raises:
        ModelError: llama.cpp's package knows no such architecture.
    """

    def __init__(self, config: Any) -> None:
        config = config.get_text_config()
        name = _ARCHITECTURES.get(config.model_type, config.model_type)
        known = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
        if name not in known:
            raise ModelError(
                f"the gguf package knows no architecture '{config.model_type}'. Export to merged, "
                "and convert that with llama.cpp's own script."
            )
        self.architecture = name
        self._map = gguf.get_tensor_name_map(known[name], config.num_hidden_layers)
        self._heads = config.num_attention_heads
        self._kv_heads = getattr(config, "num_key_value_heads", None) or self._heads

    def of(self, module: str) -> str:
        """The name of a module's weight."""
        found = self._map.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if found is None:
            raise AdapterError(f"llama.cpp has no weight for the adapted module {module}.")
        return str(found)

    def reordered(self, name: str, rows: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        """Rows [O, …] of a weight in llama.cpp's order; or `back` in Transformers'."""
        if self.architecture != "llama" or not name.endswith(_REORDERED):
            return rows
        heads = self._heads if name.endswith(_REORDERED[0]) else self._kv_heads
        half = rows.shape[0] // heads // 2
        split = (heads, half, 2) if back else (heads, 2, half)
        return rows.reshape(*split, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_model(
    source: Path,
    factors: Mapping[str, LoraFactors],
    names: TensorNames,
    path: Path,
    kind: GgufType,
) -> None:
    """Write a base model's GGUF file again, with merged weights; all else as it is, bit for bit.

    Args:
        source: the base model's.
        factors: what each module changes by.
        names: of the base model.
        path: to write to.
        kind: type of the merged weights.

    Raises:
        AdapterError: a module's weight isn't in the file, or of another shape.
    """
    reader = gguf.GGUFReader(source)
    deltas = {names.of(module): own.delta for module, own in factors.items()}
    if missing := sorted(set(deltas) - {tensor.name for tensor in reader.tensors}):
        raise AdapterError(f"{source} has no {missing[0]}: it is another base model's.")
    writer = gguf.GGUFWriter(path, arch=names.architecture, endianess=reader.endianess)
    for field in reader.fields.values():
        if field.name != gguf.Keys.General.ARCHITECTURE and not field.name.startswith("GGUF."):
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            inner = field.types[-1] if is_array else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        data, type = tensor.data, tensor.tensor_type
        if tensor.name in deltas:
            weight = gguf.quants.dequantize(data, type)
            delta = names.reordered(tensor.name, deltas[tensor.name]).numpy()
            if weight.shape != delta.shape:
                raise AdapterError(
                    f"{tensor.name} of {source} is {list(weight.shape)}, the adapter's "
                    f"{list(delta.shape)}. Name the base model that it was trained on."
                )
            type = _TYPES[kind]
            data = gguf.quants.quantize(weight + delta, type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=type)
    _write(writer)


def write_adapter(factors: Mapping[str, LoraFactors], names: TensorNames, path: Path) -> None:
    """Write an adapter as llama.cpp's `--lora` takes it, in float32: it knows one alpha for all."""
    factors = in_one_rank(factors)
    alpha = len(next(iter(factors.values())).a)
    writer = gguf.GGUFWriter(path, arch=names.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for module, own in factors.items():
        name = names.of(module)
        b = names.reordered(name, own.b)
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(own.a.numpy()))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b.numpy()))
    _write(writer)


def read_adapter(path: Path, modules: list[str], names: TensorNames) -> dict[str, LoraFactors]:
    """Read what `write_adapter` wrote.

    Args:
        path: the file.
        modules: that it is for.
        names: of the base model.

    Raises:
        AdapterError: it holds other weights.
    """
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    stored = {tensor.name: torch.tensor(np.array(tensor.data)) for tensor in reader.tensors}
    found = {}
    for module in modules:
        name = names.of(module)
        try:
            a, b = stored.pop(f"{name}.lora_a"), stored.pop(f"{name}.lora_b")
        except KeyError as error:
            raise AdapterError(f"{path} has no {error.args[0]}.") from error
        b = names.reordered(name, b, back=True)
        found[module] = LoraFactors(a=a, b=b, scale=alpha / len(a))
    if stored:
        raise AdapterError(f"{path} holds {sorted(stored)[0]}, which belongs to no module.")
    return found


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
