"""Find the modules to adapt: those that a placement stands for, in the chosen layers.

To add a placement, add it to `_find`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from memlaw.core.errors import AdapterError, ConfigError
from memlaw.model.experts import is_fused, is_mixture
from memlaw.settings.choices import Layers

# What different architectures call one module. A name that a model itself uses needs no entry.
_MLP_BLOCKS = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_ATTENTION_BLOCKS = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "mixer")
_STATE_SPACES = ("mixer", "mamba")
# Models whose kernels take in the output projection: PEFT adapts it in none of them.
_OUT_IS_FUSED = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_SYNONYMS = {
    "down_proj": (
        "mlp.c_proj",
        "mlp.dense_4h_to_h",
        "mlp.fc2",
        "mlp.fc_out",
        "fc2",
        "feed_forward.w2",
        "feed_forward.value",
        "ffn.proj_down",
        "ffn.2",
    ),
    "up_proj": (
        "mlp.c_fc",
        "mlp.dense_h_to_4h",
        "mlp.fc1",
        "mlp.fc_in",
        "fc1",
        "feed_forward.w1",
        "feed_forward.key",
        "ffn.proj_up",
        "ffn.0",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One adapted module.

    Attributes:
        module: its qualified name in the model.
        d_in, d_out: widths of its input and output.
        layer: index of its decoder layer, from 0.
        is_linear: it is a linear module, so that the adapter is an ordinary LoRA; else it is a
            whole block (as in the paper's probe).
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
    text = {id(module) for module in _text_decoder(model).modules()}
    lists = [found for found in lists if id(found[1]) in text] or lists
    if not lists:
        raise AdapterError(f"{type(model).__name__} has no list of decoder layers to adapt.")
    return max(lists, key=lambda item: len(item[1]))


def _text_decoder(model: Any) -> nn.Module:
    """The part that text runs through, in a model that also sees or hears; else the model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) else model


def auto_layer(n_layers: int) -> int:
    """Index of the default layer: two thirds of the way up (20 of 30; the paper's 24 of 36)."""
    return layers_at(n_layers, (2 / 3,))[0]


def layers_at(n_layers: int, depths: Sequence[float]) -> tuple[int, ...]:
    """Indices of the layers at these shares of the way up, each once; few layers, few indices."""
    return tuple(sorted({min(n_layers - 1, round(n_layers * depth)) for depth in depths}))


def resolve_sites(model: nn.Module, placement: str, layers: Layers) -> tuple[Site, ...]:
    """Find the modules that a placement stands for in this model.

    Args:
        model: a Transformers causal language model.
        placement: `mlp` (in parallel with the whole MLP block, as in the paper's probe), `attn`
            (every linear module of the attention), `all-linear` (every linear module of the
            layer), `down_proj`, `up_proj`, or names of linear modules; several joined by commas.
        layers: indices from 0; `auto` for the one of `auto_layer`; `all` for every layer.

    Returns:
        At least one site; layer by layer, without repetition.

    Raises:
        ConfigError: a layer is out of range.
        AdapterError: a layer has no such module. Lists those it has.
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
    model_type = str(getattr(model.config, "model_type", ""))
    sites: list[Site] = []
    for layer in sorted(set(layers)):
        block = dict(blocks[layer].named_modules())
        names = [n for part in placement.split(",") for n in _find(block, part.strip(), model_type)]
        for name in dict.fromkeys(names):
            sites.append(_site(block[name], f"{list_name}.{layer}.{name}", layer, width))
    return tuple(sites)


def _find(block: dict[str, nn.Module], placement: str, model_type: str) -> list[str]:
    # What only chooses among experts isn't adapted.
    routers = [
        f"{name}.{child}"
        for name, module in block.items()
        if is_mixture(module)
        for child, part in module.named_children()
        if isinstance(part, nn.Linear)
    ]
    linears = [
        name
        for name, module in block.items()
        if _linear_shape(module) is not None
        and name not in routers
        and not _is_read_past(name, model_type)
    ]
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
        raise AdapterError(_not_there(block, placement, linears))
    return found


def _is_read_past(name: str, model_type: str) -> bool:
    """Whether a state-space model reads a module's weight without running it.

    An adapter on it would do nothing, or only once it is merged; PEFT refuses some of them.
    """
    block, _, part = name.rpartition(".")
    if block.rpartition(".")[2] not in _STATE_SPACES:
        return False
    return part == "dt_proj" or (part == "out_proj" and model_type in _OUT_IS_FUSED)


def _not_there(block: dict[str, nn.Module], placement: str, linears: list[str]) -> str:
    """What to say of a placement that a layer hasn't got: why, and which it has."""
    fused = [n for n, module in block.items() if is_fused(module) and "attn" not in n]
    if not linears:
        return "this model's layers have no linear modules to adapt. Name another model."
    why = (
        f" ({fused[0]}: one tensor for all experts, not a linear module for each)" if fused else ""
    )
    attends = any(name.partition(".")[0] in _ATTENTION_BLOCKS for name in linears)
    return (
        f"no module '{placement}' to adapt in this model's layers{why}. Give --placement "
        f"{'attn, ' if attends else ''}all-linear, or any of {', '.join(linears)}."
    )


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
