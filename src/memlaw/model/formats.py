"""Folders that hold an adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from memlaw.core.errors import AdapterError
from memlaw.core.files import file_sha256, write_json, write_tensors
from memlaw.model.adapter import Adapter
from memlaw.model.sites import Site

PROBE_CONFIG = "memlaw_adapter.json"
PROBE_WEIGHTS = "memlaw_adapter.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"


def save_adapter(adapter: Adapter, folder: Path, *, base_path: str, base_sha256: str) -> Path:
    """Write the adapter: a PEFT folder where every site is linear, else this package's format.

    Args:
        adapter: what to save.
        folder: an existing folder.
        base_path: what plain Transformers loads the base model by.
        base_sha256: hash of the base model's weights.

    Returns:
        The file that holds the weights.
    """
    adapter = adapter.folded()
    if not adapter.is_peft:
        weights = {
            f"{site.module}.{letter}": part.detach()
            for letter, parts in (("A", adapter.a), ("B", adapter.b))
            for site, part in zip(adapter.sites, parts, strict=True)
        }
        write_tensors(folder / PROBE_WEIGHTS, weights)
        write_json(
            folder / PROBE_CONFIG,
            {
                "format": 1,
                "rank": adapter.rank,
                "sites": [asdict(s) for s in adapter.sites],
                "formula": "f(x) + (x A) B",
                "base_model": base_path,
                "base_sha256": base_sha256,
            },
        )
        return folder / PROBE_WEIGHTS
    from peft import LoraConfig

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.rank,  # PEFT scales by alpha / r; ours is 1
        target_modules=sorted(site.module for site in adapter.sites),
        fan_in_fan_out=all(site.is_transposed for site in adapter.sites),
        base_model_name_or_path=base_path,
        inference_mode=True,
    )
    content = config.to_dict()
    content["target_modules"] = sorted(content["target_modules"])
    weights = {}
    for site, a, b in zip(adapter.sites, adapter.a, adapter.b, strict=True):
        weights[f"base_model.model.{site.module}.lora_A.weight"] = a.detach().T.contiguous()
        weights[f"base_model.model.{site.module}.lora_B.weight"] = b.detach().T.contiguous()
    write_tensors(folder / PEFT_WEIGHTS, weights)
    write_json(folder / PEFT_CONFIG, content)
    return folder / PEFT_WEIGHTS


@contextmanager
def loaded_adapter(folder: Path, model: nn.Module) -> Iterator[nn.Module]:
    """Within the `with` block, a model that computes with the adapter saved in `folder`.

    Loads any PEFT folder, through PEFT, or this package's own format.

    Raises:
        AdapterError: no adapter there, weights not in safetensors, or made for another model.
    """
    if (folder / PROBE_CONFIG).is_file():
        with _load_probe(folder, model).attached(model):
            yield model
        return
    if not (folder / PEFT_CONFIG).is_file():
        raise AdapterError(
            f"{folder} holds no adapter: neither {PEFT_CONFIG} nor {PROBE_CONFIG}. Name the "
            "folder that 'memlaw write -o' or PEFT's save_pretrained wrote."
        )
    if not (folder / PEFT_WEIGHTS).is_file():
        raise AdapterError(
            f"{folder} has no {PEFT_WEIGHTS}. Pickled weights (adapter_model.bin) are never "
            "loaded; save the adapter again with PEFT's save_pretrained."
        )
    from peft import PeftModel

    try:
        wrapped = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # PEFT lets through whatever a malformed folder leads to
        raise AdapterError(
            f"{folder} can't be loaded onto this base model: {str(error)[:300]}"
        ) from error
    wrapped.eval()
    try:
        yield wrapped.get_base_model()
    finally:
        wrapped.unload()


def _load_probe(folder: Path, model: nn.Module) -> Adapter:
    try:
        config = json.loads((folder / PROBE_CONFIG).read_text(encoding="utf-8"))
        sites = tuple(Site(**site) for site in config["sites"])
        weights = load_file(folder / PROBE_WEIGHTS)
        adapter = Adapter(sites, rank=config["rank"], seed=0)
        with torch.no_grad():
            for site, a, b in zip(sites, adapter.a, adapter.b, strict=True):
                model.get_submodule(site.module)
                a.copy_(weights[f"{site.module}.A"])
                b.copy_(weights[f"{site.module}.B"])
    except Exception as error:
        raise AdapterError(
            f"{folder}: unreadable adapter, or not for this model: {error}"
        ) from error
    return adapter.to(next(model.parameters()).device)


def adapter_sha256(folder: Path) -> str:
    """Hash of the adapter's weight file.

    Raises:
        AdapterError: there is none.
    """
    for name in (PEFT_WEIGHTS, PROBE_WEIGHTS):
        if (folder / name).is_file():
            return file_sha256(folder / name)
    raise AdapterError(f"{folder} holds no adapter weights.")
