"""Adapters that PEFT wrote: loaded as a user's `PeftModel` is, or refused by name.

PEFT only warns of weights that find no place in the model, and some kinds of adapters act in its
wrapper alone, which isn't what is measured here.

Shapes: V rows of the embedding, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from memlaw.core.errors import AdapterError
from memlaw.core.files import read_json
from memlaw.model.hashes import refuse_pointer

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SHOWN = 3

# Kinds that can't be measured on the model inside PEFT's wrapper, by `peft_type`.
_VIRTUAL = "puts virtual tokens before the prompt, which only PEFT's own wrapper does"
REFUSED = {
    "PROMPT_TUNING": f"prompt tuning {_VIRTUAL}",
    "MULTITASK_PROMPT_TUNING": f"multitask prompt tuning {_VIRTUAL}",
    "P_TUNING": f"P-tuning {_VIRTUAL}",
    "PREFIX_TUNING": "prefix tuning puts keys and values before the prompt's, which only PEFT's "
    "own wrapper does",
    "CPT": f"context-aware prompt tuning {_VIRTUAL}",
    "CARTRIDGE": "a cartridge puts keys and values before the prompt's, which only PEFT's own "
    "wrapper does",
    "ADAPTION_PROMPT": "an adaption prompt replaces whole attention modules",
    "XLORA": "X-LoRA mixes several adapters, which lie elsewhere",
    "POLY": "Poly chooses its weights by a task id, which a prompt doesn't have",
    "SHADOW": "a shadow runs a second model beside the base model",
}


@contextmanager
def peft_loaded(folder: Path, model: nn.Module) -> Iterator[Any]:
    """A context in which the model has the PEFT adapter of a folder; its value is the `PeftModel`.

    An adapter that brings the embedding's and the head's rows for another vocabulary gets a model
    of that size. Afterwards the model is what it was.

    Raises:
        AdapterError: no safetensors weights there, a kind that can't be measured, or weights that
            don't fit this model, by name.
    """
    config = read_json(folder / PEFT_CONFIG, AdapterError, "Fetch or make it again.")
    if "peft_type" not in config and "fine_tune_type" in config:
        raise AdapterError(
            f"{folder} is an adapter of MLX, whose weights have other names and are turned round. "
            "Convert it to PEFT's form, or fuse it with mlx_lm.fuse and name the result by --model."
        )
    if not (folder / PEFT_WEIGHTS).is_file():
        raise AdapterError(
            f"{folder} has no {PEFT_WEIGHTS}. Pickled weights (adapter_model.bin) are never "
            "loaded; save the adapter again with PEFT's save_pretrained."
        )
    from peft import PeftModel

    _require_whole(folder / PEFT_WEIGHTS)
    kind = str(config.get("peft_type")).upper()
    if kind in REFUSED:
        raise AdapterError(
            f"{folder} can't be measured: {REFUSED[kind]}. Measure adapters that change the "
            "model's own modules, such as LoRA."
        )
    # Of the form {old name: new name}; PEFT applies it when it loads an adapter.
    renamed = getattr(model, "_checkpoint_conversion_mapping", {})
    with ExitStack() as stack:
        try:
            shapes = stored_shapes(folder / PEFT_WEIGHTS)
            stack.enter_context(_resized(folder, model, shapes))
            stack.enter_context(_put_back(model, shapes, everything=_changes_base(config)))
            wrapped = PeftModel.from_pretrained(model, str(folder))
            stack.callback(wrapped.unload)
            # A second time, for what PEFT would only have warned of.
            loading = wrapped.load_adapter(
                str(folder),
                "default",
                torch_device=str(next(model.parameters()).device),
                key_mapping=renamed,
            )
        except AdapterError:
            raise
        except Exception as error:  # PEFT lets through whatever a malformed folder leads to
            raise AdapterError(
                f"{folder} can't be loaded onto this base model: {str(error)[:300]}"
            ) from error
        _require_all(folder, model, loading.missing_keys, loading.unexpected_keys)
        wrapped.eval()
        if not config.get("alora_invocation_tokens"):
            _require_same(folder, kind, wrapped)
        yield wrapped


def _require_whole(path: Path) -> None:
    """Raise AdapterError where weights are missing or damaged, in words of what users did."""
    refuse_pointer(path, AdapterError)
    try:
        with safe_open(path, framework="pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise AdapterError(
            f"{path}: damaged weights ({error}). Fetch or save them again."
        ) from error
    empty = [key for key, weight in weights.items() if not weight.numel()]
    if empty or not weights:
        what = (
            f"{len(empty)} of its weights have no numbers ({empty[0]})" if empty else "it is empty"
        )
        raise AdapterError(
            f"{path}: {what}, as where DeepSpeed's ZeRO-3 had spread them over processes. Save the "
            "adapter again with stage3_gather_16bit_weights_on_model_save, or get it out of the "
            "checkpoint with zero_to_fp32.py."
        )
    if odd := [k for k, w in weights.items() if w.is_floating_point() and not w.isfinite().all()]:
        raise AdapterError(
            f"{path}: {len(odd)} of its weights hold numbers that are not finite ({odd[0]}): the "
            "training has diverged. Take an earlier checkpoint."
        )


def changes_nothing(folder: Path) -> bool:
    """Whether each B of a LoRA is zero, as before training: the model answers as without it."""
    path = folder / PEFT_WEIGHTS
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
        return all(".lora_A" in k or ".lora_B" in k for k in keys) and not any(
            file.get_tensor(k).any() for k in keys if ".lora_B" in k
        )


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights in a safetensors file, by key.

    Raises:
        AdapterError: it can't be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            return {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    except (OSError, RuntimeError, SafetensorError) as error:
        raise AdapterError(f"{path} can't be read ({error}). Fetch or make it again.") from error


def _require_all(
    folder: Path, model: nn.Module, missing: Sequence[str], unexpected: Sequence[str]
) -> None:
    """Raise AdapterError, naming keys, unless each weight has found its place and is there."""
    found = [
        f"{len(keys)} {what} ({', '.join(keys[:_SHOWN])}{' …' if len(keys) > _SHOWN else ''})"
        for what, keys in (
            ("of its weights find no place in the model", list(unexpected)),
            ("weights that the model asks for are not in it", list(missing)),
        )
        if keys
    ]
    if found:
        raise AdapterError(
            f"{folder / PEFT_WEIGHTS} doesn't fit {type(model).__name__}: {'; '.join(found)}. "
            "Name the base model that it was trained on with --model, or rename the weights."
        )


def _require_same(folder: Path, kind: str, wrapped: Any) -> None:
    """Raise AdapterError unless the model inside PEFT's wrapper computes what the wrapper does."""
    inner = wrapped.get_base_model()
    ids = torch.arange(8, device=next(inner.parameters()).device)[None]
    with torch.no_grad():
        try:
            outer = wrapped(input_ids=ids).logits
            same = torch.allclose(outer, inner(input_ids=ids).logits, rtol=1e-3, atol=1e-3)
        except Exception as error:  # whatever a kind of adapter asks for beside the prompt
            raise AdapterError(
                f"{folder} can't be measured: its kind, {kind}, can't be run on a prompt alone "
                f"({str(error)[:200]})."
            ) from error
    if not same:
        raise AdapterError(
            f"{folder} can't be measured: its kind, {kind}, acts in PEFT's own wrapper only. "
            "Measure adapters that change the model's own modules, such as LoRA."
        )


def _changes_base(config: dict[str, Any]) -> bool:
    """Whether loading the adapter changes the base model's own weights (PiSSA, OLoRA, …)."""
    start = config.get("init_lora_weights")
    return isinstance(start, str) and start.lower() != "gaussian"


@contextmanager
def _put_back(
    model: nn.Module, shapes: dict[str, tuple[int, ...]], *, everything: bool
) -> Iterator[None]:
    """Afterwards the base model has its own modules again, and weights as they were.

    Weights that an adapter's file holds (biases, embeddings), or all. PEFT's `unload` leaves
    modules that were trained whole in the model.
    """
    modules = [(module, dict(module._modules)) for module in model.modules()]
    stored = {key.removeprefix(_PREFIX).replace(".base_layer.", ".") for key in shapes}
    kept = [
        (weight, weight.detach().clone())
        for name, weight in model.named_parameters(remove_duplicate=False)
        if everything or name in stored
    ]
    try:
        yield
    finally:
        for module, children in modules:
            module._modules.clear()
            module._modules.update(children)
        with torch.no_grad():
            for weight, value in kept:
                weight.copy_(value)


@contextmanager
def _resized(folder: Path, model: Any, shapes: dict[str, tuple[int, ...]]) -> Iterator[None]:
    """Within the block, the model's vocabulary is as large as the adapter's embedding [V, D]."""
    usual, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    rows = {
        name: shapes[key][0]
        for name in (names[id(module)] for module in (usual, head) if module is not None)
        for key in (f"{_PREFIX}{name}.weight", f"{_PREFIX}{name}.base_layer.weight")
        if key in shapes
    }
    before = usual.weight.shape[0]
    wanted = set(rows.values()) - {before}
    if not wanted:
        yield
        return
    tied = head is not None and head.weight is usual.weight
    if len(set(rows.values())) > 1 or (head is not None and not tied and len(rows) < 2):
        raise AdapterError(
            f"{folder / PEFT_WEIGHTS} is of another vocabulary than the base model, and not "
            f"complete: it has {', '.join(f'{n} rows of {name}' for name, n in rows.items())}, "
            f"and the model has {before} of the embedding and of the head. Save it again with "
            "save_embedding_layers=True, or name the base model that it was trained on."
        )
    config = model.config.get_text_config()
    size = config.vocab_size
    model.set_input_embeddings(copy.deepcopy(usual))
    if head is not None and not tied:
        model.set_output_embeddings(copy.deepcopy(head))
    model.tie_weights()
    try:
        model.resize_token_embeddings(wanted.pop(), mean_resizing=False)
        model.requires_grad_(False)
        yield
    finally:
        model.set_input_embeddings(usual)
        if head is not None:
            model.set_output_embeddings(head)
            head.out_features = before
        config.vocab_size = size
        if hasattr(model, "vocab_size"):
            model.vocab_size = size
        model.tie_weights()
