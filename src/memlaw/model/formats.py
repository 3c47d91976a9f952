"""Adapters in folders: how each format is saved, loaded and recognised.

To add a format, write its functions, and add it to `FORMATS`. All that reads such folders, or lists
their files, uses that table.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from memlaw.core.errors import AdapterError
from memlaw.core.files import file_sha256, read_json, write_json, write_tensors
from memlaw.model.adapter import Adapter
from memlaw.model.body import body_of
from memlaw.model.invocation import Invocation
from memlaw.model.peft_folder import PEFT_CONFIG, PEFT_WEIGHTS, peft_loaded, stored_shapes
from memlaw.model.sites import Site

_MEMLAW_CONFIG = "memlaw_adapter.json"
_MEMLAW_WEIGHTS = "memlaw_adapter.safetensors"


@dataclass(frozen=True, kw_only=True)
class NamedBase:
    """The base model of a saved adapter, as far as its folder names it.

    Attributes:
        path: what plain Transformers loads it by: a hub id, or a folder.
        sha256: hash of its weights.
    """

    path: str | None
    sha256: str | None


@dataclass(frozen=True, kw_only=True)
class AdapterFormat:
    """One format.

    Attributes:
        config_file: name of the JSON file by which such a folder is recognised.
        weights_file: name of the file that holds the weights.
        fits: whether an adapter can be saved in it.
        save: writes an adapter without whiteners, trained on this base, into an existing folder.
        loaded: a context in which the model has the adapter of a folder; its value is the model.
            Raises AdapterError if the folder can't be loaded onto this model.
        base: the base model that the content of `config_file` names.
        names: of A and B of a site in the weights file.
        turned: they are saved as [R, D_in] and [D_out, R].
    """

    config_file: str
    weights_file: str
    fits: Callable[[Adapter], bool]
    save: Callable[[Adapter, Path, NamedBase], None]
    loaded: Callable[[Path, nn.Module], AbstractContextManager[nn.Module]]
    base: Callable[[dict[str, Any]], NamedBase]
    names: Callable[[str], tuple[str, str]]
    turned: bool


def save_adapter(adapter: Adapter, folder: Path, *, base_path: str, base_sha256: str) -> Path:
    """Write the adapter: a PEFT folder if every site is linear, else this package's format.

    Args:
        adapter: what to save.
        folder: an existing folder.
        base_path: what plain Transformers loads the base model by.
        base_sha256: hash of the base model's weights.

    Returns:
        The file that holds the weights.
    """
    format = next(f for f in FORMATS if f.fits(adapter))
    format.save(adapter.folded(), folder, NamedBase(path=base_path, sha256=base_sha256))
    return folder / format.weights_file


@contextmanager
def loaded_adapter(folder: Path, model: nn.Module) -> Iterator[nn.Module]:
    """A context in which the model has the adapter saved in `folder`; its value is the model.

    Any PEFT adapter is loaded, by PEFT; else this package's own format.

    Raises:
        AdapterError: no adapter there, weights not in safetensors, or an adapter of another model.
    """
    format = _format_of(folder)
    if format is None:
        raise AdapterError(_no_adapter(folder))
    with format.loaded(folder, model) as adapted:
        yield adapted


def found_adapter(folder: Path) -> tuple[Path, str]:
    """The adapter that a trainer left in a folder, and a sentence on which one was taken.

    The folder itself, if it is one; else of `checkpoint-N`, as trainers leave them, the one with
    the highest N; else the only adapter in a subfolder. The sentence is empty where there was no
    choice to make; if nothing is found, or several that no number orders, the folder comes back.
    """
    if _format_of(folder) is not None or not folder.is_dir():
        return folder, ""
    within = sorted(
        {
            p.parent
            for f in FORMATS
            for depth in ("*", "*/*")
            for p in folder.glob(f"{depth}/{f.config_file}")
        }
    )
    numbered = {
        int(match[1]): path
        for path in within
        if (match := _CHECKPOINT.fullmatch(path.relative_to(folder).parts[0]))
    }
    if numbered:
        last = max(numbered)
        others = f", the last of {len(numbered)} checkpoints" if len(numbered) > 1 else ""
        return numbered[last], f"{folder} itself is no adapter: {numbered[last]} is taken{others}."
    if len(within) == 1:
        return within[
            0
        ], f"{folder} itself is no adapter: {within[0]}, the only one in it, is taken."
    return folder, ""


_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def _no_adapter(folder: Path) -> str:
    known = " nor ".join(f.config_file for f in FORMATS)
    said = f"{folder} holds no adapter: neither {known}. "
    patterns = [f"{place}/{f.config_file}" for f in FORMATS for place in ("*", "shards/*")]
    within = sorted({path.parent for pattern in patterns for path in folder.glob(pattern)})
    if within:
        return f"{said}Name one of the adapters in it: {', '.join(map(str, within[:5]))}."
    if (folder / "config.json").is_file():
        return f"{said}It is a whole model; name it with --model."
    return f"{said}Name the folder that 'memlaw write -o' or PEFT's save_pretrained wrote."


def saved_factors(folder: Path, sites: Sequence[Site]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A [D_in, R] and B [R, D_out] of each site, of an adapter that `save_adapter` saved.

    Raises:
        AdapterError: it can't be read, or sits elsewhere.
    """
    format = _format_of(folder)
    if format is None:
        raise AdapterError(_no_adapter(folder))
    path = folder / format.weights_file
    try:
        weights = load_file(path)
    except Exception as error:
        raise AdapterError(f"{path}: unreadable ({error}). Fetch or make it again.") from error
    names = [format.names(site.module) for site in sites]
    if {name for pair in names for name in pair} != weights.keys():
        raise AdapterError(
            f"{path}: this adapter doesn't sit where one with its settings would be put now "
            f"({', '.join(site.module for site in sites[:3])}). Write anew with 'memlaw write'."
        )
    found = [(weights[a], weights[b]) for a, b in names]
    return [(a.T.contiguous(), b.T.contiguous()) if format.turned else (a, b) for a, b in found]


def adapter_sha256(folder: Path) -> str:
    """Hash of the adapter's weight file.

    Raises:
        AdapterError: there is none.
    """
    for format in FORMATS:
        if (folder / format.weights_file).is_file():
            return file_sha256(folder / format.weights_file)
    raise AdapterError(f"{folder} holds no adapter weights.")


def adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the adapter's weights, by name.

    Raises:
        AdapterError: there are none.
    """
    for format in FORMATS:
        if (folder / format.weights_file).is_file():
            return stored_shapes(folder / format.weights_file)
    raise AdapterError(f"{folder} holds no adapter weights.")


def n_parameters(folder: Path) -> int:
    """How many numbers a saved adapter has; raises AdapterError as `adapter_shapes`."""
    return sum(math.prod(shape) for shape in adapter_shapes(folder).values())


def adapter_base(folder: Path) -> NamedBase:
    """The base model that a saved adapter names.

    Raises:
        AdapterError: the adapter's settings can't be read.
    """
    format = _format_of(folder)
    if format is None:
        return NamedBase(path=None, sha256=None)
    mend = "Fetch or make it again."
    return format.base(read_json(folder / format.config_file, AdapterError, mend))


def adapter_config_file(folder: Path) -> Path:
    """The file that holds a saved adapter's settings.

    Raises:
        AdapterError: no adapter there.
    """
    format = _format_of(folder)
    if format is None:
        raise AdapterError(_no_adapter(folder))
    return folder / format.config_file


def _format_of(folder: Path) -> AdapterFormat | None:
    return next((f for f in FORMATS if (folder / f.config_file).is_file()), None)


# ---------------------------------------------------------------- PEFT


def _save_peft(adapter: Adapter, folder: Path, base: NamedBase) -> None:
    from peft import LoraConfig

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.rank,  # PEFT scales by alpha / r; ours is 1
        target_modules=sorted(site.module for site in adapter.sites),
        fan_in_fan_out=all(site.is_transposed for site in adapter.sites),
        alora_invocation_tokens=list(adapter.invocation_ids) or None,
        base_model_name_or_path=base.path,
        inference_mode=True,
    )
    content = config.to_dict()
    content["target_modules"] = sorted(content["target_modules"])
    weights = {}
    for site, a, b in zip(adapter.sites, adapter.a, adapter.b, strict=True):
        for name, factor in zip(peft_names(site.module), (a, b), strict=True):
            weights[name] = factor.detach().T.contiguous()
    write_tensors(folder / PEFT_WEIGHTS, weights)
    write_json(folder / PEFT_CONFIG, content)


def peft_names(module: str) -> tuple[str, str]:
    """What PEFT calls a module's A and B in its weights file."""
    before = f"base_model.model.{module}"
    return f"{before}.lora_A.weight", f"{before}.lora_B.weight"


def peft_modules(names: Iterable[str]) -> list[str]:
    """The modules whose A is among the names of a PEFT weights file, in order."""
    before, after = peft_names("/")[0].split("/")
    return sorted(
        name.removeprefix(before).removesuffix(after)
        for name in names
        if name.startswith(before) and name.endswith(after)
    )


@contextmanager
def _loaded_peft(folder: Path, model: nn.Module) -> Iterator[nn.Module]:
    ids = invocation_ids(folder)
    with (
        peft_loaded(folder, model) as wrapped,
        _activated(folder, wrapped.get_base_model(), ids) as adapted,
    ):
        yield adapted


def invocation_ids(folder: Path) -> tuple[int, ...]:
    """The invocation tokens of the adapter saved in `folder`; empty: it is always active.

    Raises:
        AdapterError: the adapter's settings can't be read, or name no token ids.
    """
    if not (folder / PEFT_CONFIG).is_file():
        return ()
    config = read_json(folder / PEFT_CONFIG, AdapterError, "Fetch or make it again.")
    ids = config.get("alora_invocation_tokens")
    if ids is None:
        return ()
    if not (isinstance(ids, list) and ids and all(type(token) is int for token in ids)):
        raise AdapterError(
            f"{folder / PEFT_CONFIG}: alora_invocation_tokens is {ids!r:.60}. It must be a list "
            "of token ids, at least one, or null. Fetch the adapter again."
        )
    return tuple(ids)


@contextmanager
def _activated(folder: Path, model: nn.Module, ids: tuple[int, ...]) -> Iterator[nn.Module]:
    """Tell PEFT's layers where they are active: only PEFT's own wrapper of the model does that."""
    if not ids:
        yield model
        return
    from peft.tuners.lora import LoraLayer

    invocation = Invocation(ids)

    def tell(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "alora_offsets": invocation.offsets()}

    body = set(body_of(model).modules())
    with ExitStack() as stack:
        stack.enter_context(invocation.watching(model))
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                if module not in body:
                    raise AdapterError(
                        f"{folder} is an activated adapter of {name}, which computes only some of "
                        "an input's positions. Adapt modules of the decoder layers instead."
                    )
                hook = module.register_forward_pre_hook(tell, with_kwargs=True)
                stack.callback(hook.remove)
        yield model


def _peft_base(config: dict[str, Any]) -> NamedBase:
    return NamedBase(path=config.get("base_model_name_or_path"), sha256=None)


# ---------------------------------------------------------------- this package's own


def _save_memlaw(adapter: Adapter, folder: Path, base: NamedBase) -> None:
    weights = {
        name: part.detach()
        for site, *parts in zip(adapter.sites, adapter.a, adapter.b, strict=True)
        for name, part in zip(_memlaw_names(site.module), parts, strict=True)
    }
    write_tensors(folder / _MEMLAW_WEIGHTS, weights)
    write_json(
        folder / _MEMLAW_CONFIG,
        {
            "format": 1,
            "rank": adapter.rank,
            "sites": [asdict(s) for s in adapter.sites],
            "formula": "f(x) + (x A) B",
            "base_model": base.path,
            "base_sha256": base.sha256,
        },
    )


def _memlaw_names(module: str) -> tuple[str, str]:
    return f"{module}.A", f"{module}.B"


def _loaded_memlaw(folder: Path, model: nn.Module) -> AbstractContextManager[nn.Module]:
    try:
        config = json.loads((folder / _MEMLAW_CONFIG).read_text(encoding="utf-8"))
        sites = tuple(Site(**site) for site in config["sites"])
        weights = load_file(folder / _MEMLAW_WEIGHTS)
        adapter = Adapter(sites, rank=config["rank"], seed=0)
        parts = {
            f"{site.module}.{letter}": part
            for letter, factors in (("A", adapter.a), ("B", adapter.b))
            for site, part in zip(sites, factors, strict=True)
        }
        if {n: p.shape for n, p in parts.items()} != {n: w.shape for n, w in weights.items()}:
            raise ValueError("its weights are not those that its settings name")
        with torch.no_grad():
            for name, part in parts.items():
                model.get_submodule(name.rpartition(".")[0])
                part.copy_(weights[name])
    except Exception as error:
        raise AdapterError(
            f"{folder}: unreadable adapter, or not for this model: {error}"
        ) from error
    return adapter.to(next(model.parameters()).device).attached(model)


def _memlaw_base(config: dict[str, Any]) -> NamedBase:
    sha256 = config.get("base_sha256")
    return NamedBase(path=config.get("base_model"), sha256=None if sha256 is None else str(sha256))


# The first that fits is the one an adapter is saved in.
FORMATS = (
    AdapterFormat(
        config_file=PEFT_CONFIG,
        weights_file=PEFT_WEIGHTS,
        fits=lambda adapter: adapter.is_peft,
        save=_save_peft,
        loaded=_loaded_peft,
        base=_peft_base,
        names=peft_names,
        turned=True,
    ),
    AdapterFormat(
        config_file=_MEMLAW_CONFIG,
        weights_file=_MEMLAW_WEIGHTS,
        fits=lambda adapter: True,
        save=_save_memlaw,
        loaded=_loaded_memlaw,
        base=_memlaw_base,
        names=_memlaw_names,
        turned=False,
    ),
)
ADAPTER_FILES = tuple(name for f in FORMATS for name in (f.config_file, f.weights_file))
