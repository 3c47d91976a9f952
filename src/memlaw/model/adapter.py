"""LoRA adapters around frozen modules: where they sit, what they compute, how they are saved.

Shapes: D_in, D_out widths of the adapted module; R rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from memlaw.core.errors import AdapterError, ConfigError
from memlaw.core.files import file_sha256, write_json, write_tensors
from memlaw.settings.choices import Layers

Tensor = torch.Tensor

PROBE_CONFIG = "memlaw_adapter.json"
PROBE_WEIGHTS = "memlaw_adapter.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"

# What architectures call the same thing. Where a name is in the model as it is, it needs no entry.
_MLP_BLOCKS = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_ATTENTION_BLOCKS = ("self_attn", "attn", "attention", "self_attention")
_SYNONYMS = {
    "down_proj": ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "fc2"),
    "up_proj": ("mlp.up_proj", "mlp.c_fc", "mlp.dense_h_to_4h", "mlp.fc1", "fc1"),
}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One adapted module.

    Attributes:
        module: its qualified name in the model.
        d_in, d_out: widths of what it reads and writes.
        layer: index of the decoder layer it lies in, from 0.
        is_linear: it is a linear map, so a stock LoRA; else a whole block (the paper's probe).
        is_transposed: its weight is stored as [D_in, D_out] (GPT-2's Conv1D).
    """

    module: str
    d_in: int
    d_out: int
    layer: int
    is_linear: bool
    is_transposed: bool


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The qualified name and the list of the model's decoder layers.

    Raises:
        AdapterError: the model has no list of layers.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and m]
    if not lists:
        raise AdapterError(f"{type(model).__name__} has no list of decoder layers to adapt.")
    return max(lists, key=lambda item: len(item[1]))


def auto_layer(n_layers: int) -> int:
    """The default layer: two thirds of the way up (20 of 30; the paper's 24 of 36)."""
    return min(n_layers - 1, round(n_layers * 2 / 3))


def resolve_sites(model: nn.Module, placement: str, layers: Layers) -> tuple[Site, ...]:
    """Find the modules that a placement means in this model.

    Args:
        model: a Transformers decoder.
        placement: `mlp` (in parallel with the whole MLP block: the paper's probe), `attn` (every
            linear map of the attention), `all-linear` (every linear map of the layer),
            `down_proj`, `up_proj`, or names of linear modules, joined by commas.
        layers: indices from 0; `auto` is two thirds of the way up; `all`.

    Raises:
        ConfigError: a layer out of range.
        AdapterError: no such module in a layer. Lists what there is.
    """
    list_name, blocks = decoder_layers(model)
    if layers == "auto":
        layers = (auto_layer(len(blocks)),)
    elif layers == "all":
        layers = tuple(range(len(blocks)))
    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise ConfigError(
                f"layer {layer} is out of range: the model's layers are 0 to {len(blocks) - 1}."
            )
    width = int(model.config.get_text_config().hidden_size)  # type: ignore[operator, union-attr]
    sites: list[Site] = []
    for layer in sorted(set(layers)):
        block = dict(blocks[layer].named_modules())
        names = [n for part in placement.split(",") for n in _find(block, part.strip())]
        for name in dict.fromkeys(names):
            sites.append(_site(block[name], f"{list_name}.{layer}.{name}", layer, width))
    return tuple(sites)


def _find(block: dict[str, nn.Module], placement: str) -> list[str]:
    linears = [name for name, module in block.items() if _linear_shape(module) is not None]
    if placement == "mlp":
        found = [name for name in _MLP_BLOCKS if name in block]
    elif placement == "attn":
        found = [n for n in linears if n.partition(".")[0] in _ATTENTION_BLOCKS]
    elif placement == "all-linear":
        found = linears
    else:
        found = [n for n in linears if n == placement or n.endswith("." + placement)]
        found = found or [n for n in _SYNONYMS.get(placement, ()) if n in linears][:1]
    if not found:
        raise AdapterError(
            f"no module '{placement}' to adapt in this model's layers. Placements: mlp, attn, "
            f"all-linear, down_proj, or any of {', '.join(linears)}."
        )
    return found


def _linear_shape(module: nn.Module) -> tuple[int, int, bool] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, False
    if type(module).__name__ == "Conv1D":
        d_in, d_out = module.weight.shape  # type: ignore[misc]
        return int(d_in), int(d_out), True
    return None


def _site(module: nn.Module, name: str, layer: int, width: int) -> Site:
    shape = _linear_shape(module)
    d_in, d_out, transposed = shape or (width, width, False)
    return Site(
        module=name,
        d_in=d_in,
        d_out=d_out,
        layer=layer,
        is_linear=shape is not None,
        is_transposed=transposed,
    )


class Whitener(Protocol):
    """A fixed linear map of a site's input space."""

    def apply(self, columns: Tensor) -> Tensor:
        """The map times [D_in, R]."""
        ...


class Adapter(nn.Module):
    """A LoRA adapter on one or more sites of a frozen model.

    While attached, an adapted module f returns `f(x) + (x A) B`. A starts Kaiming-uniform
    (a = √5, that is U(±1/√D_in)), B starts at zero, the scale is 1. Weights are float32 whatever
    the model's dtype; the sum is formed in float32 and cast back, as PEFT does.

    With whiteners, A = W A′ and A′ is what is initialised and trained; `folded` gives the plain
    adapter that computes the same.

    With dropout, and once `begin_step` was called, what is added is dropped elementwise (the
    published probe does so in training). A folded adapter drops nothing.

    Args:
        sites: where.
        rank: R ≥ 1, at most the width of the narrowest site.
        seed: of A's initialisation, and of what is dropped.
        whiteners: one a site, or none at all.
        dropout: share of `(x A) B` that is dropped, in [0, 1).

    Raises:
        ConfigError: the rank is out of range.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        rank: int,
        seed: int,
        whiteners: Sequence[Whitener] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        limit = min(min(site.d_in, site.d_out) for site in sites)
        if not 1 <= rank <= limit:
            raise ConfigError(f"rank {rank} is out of range: 1 to {limit} for this placement.")
        self.sites = tuple(sites)
        self.seed = seed
        self.whiteners = tuple(whiteners)
        self.dropout = dropout
        self.draws: torch.Generator | None = None
        generator = torch.Generator().manual_seed(seed)
        self.a = nn.ParameterList(_kaiming(site.d_in, rank, generator) for site in sites)
        self.b = nn.ParameterList(torch.zeros(rank, site.d_out) for site in sites)

    @property
    def rank(self) -> int:
        """R."""
        return self.a[0].shape[1]

    @property
    def n_parameters(self) -> int:
        """How many numbers are trained: R · Σ (D_in + D_out)."""
        return sum(p.numel() for p in self.parameters())

    @property
    def is_peft(self) -> bool:
        """Every site is a linear module, so that PEFT can load the adapter."""
        return all(site.is_linear for site in self.sites)

    def begin_step(self, number: int) -> None:
        """Draw anew what is dropped, as belongs to the step of that number."""
        if self.dropout:
            self.draws = torch.Generator().manual_seed(self.seed * 1_000_003 + number)

    def attached(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Within the `with` block, `model`, which is the block's value, has the adapter."""
        return attached(model, [(self, 0)])

    def delta(self, module: str, x: Tensor) -> Tensor | None:
        """What it adds to a module's output: `(x A) B` [..., D_out] float32; None if nothing."""
        for i, site in enumerate(self.sites):
            if site.module == module:
                delta = lora_delta(x, *self.factors(i))
                if self.draws is None:
                    return delta
                kept = torch.rand(delta.shape, generator=self.draws) >= self.dropout
                return delta * kept.to(delta.device) / (1 - self.dropout)
        return None

    def factors(self, index: int) -> tuple[Tensor, Tensor]:
        """A [D_in, R] and B [R, D_out] of a site, whitening applied."""
        a = self.a[index]
        return (self.whiteners[index].apply(a) if self.whiteners else a), self.b[index]

    def folded(self) -> Adapter:
        """A plain adapter, without whiteners, that computes the same function."""
        plain = Adapter(self.sites, rank=self.rank, seed=self.seed).to(self.a[0].device)
        with torch.no_grad():
            for i in range(len(self.sites)):
                a, b = self.factors(i)
                plain.a[i].copy_(a)
                plain.b[i].copy_(b)
        return plain

    def grown(self, rank: int) -> Adapter:
        """An adapter of a higher rank that computes the same function.

        The added columns of A are initialised anew, the added rows of B are zero.
        """
        bigger = Adapter(
            self.sites,
            rank=rank,
            seed=self.seed + rank,
            whiteners=self.whiteners,
            dropout=self.dropout,
        ).to(self.a[0].device)
        with torch.no_grad():
            for large, small in zip(bigger.a, self.a, strict=True):
                large[:, : self.rank] = small
            for large, small in zip(bigger.b, self.b, strict=True):
                large[: self.rank] = small
        bigger.seed = self.seed
        return bigger


def _kaiming(d_in: int, rank: int, generator: torch.Generator) -> Tensor:
    return (torch.rand(d_in, rank, generator=generator) * 2 - 1) / math.sqrt(d_in)


def lora_delta(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`(x A) B`: [..., D_in] of any dtype to [..., D_out] in float32."""
    return (x.float() @ a) @ b


@contextmanager
def attached(model: nn.Module, parts: Sequence[tuple[Adapter, int]]) -> Iterator[nn.Module]:
    """Within the `with` block, `model`, which is the block's value, has the adapters.

    Args:
        model: the model.
        parts: adapters, and how many tokens of the one sequence that is run each of them is for,
            in order. With a single adapter the number is not looked at: it is for everything.
    """
    modules = dict.fromkeys(site.module for adapter, _ in parts for site in adapter.sites)
    hooks = [
        model.get_submodule(name).register_forward_hook(_lora_hook(parts, name)) for name in modules
    ]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _lora_hook(parts: Sequence[tuple[Adapter, int]], name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not isinstance(output, torch.Tensor):
            raise AdapterError(
                f"{type(module).__name__} returns a {type(output).__name__}, not a tensor: it "
                "can't be adapted as a block. Adapt its linear modules instead."
            )
        return add_deltas(parts, name, inputs[0], output)

    return hook


def add_deltas(
    parts: Sequence[tuple[Adapter, int]], module: str, x: Tensor, output: Tensor
) -> Tensor:
    """A module's output with what the adapters add, in the output's dtype; parts as `attached`."""
    if len(parts) == 1:
        delta = parts[0][0].delta(module, x)
        return output if delta is None else (output.float() + delta).to(output.dtype)
    counts = [count for _, count in parts]
    pieces = zip(parts, x.split(counts, dim=-2), output.split(counts, dim=-2), strict=True)
    return torch.cat([add_deltas([part], module, i, o) for part, i, o in pieces], dim=-2)


# ---------------------------------------------------------------- files


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
