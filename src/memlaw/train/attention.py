"""Attention over records packed behind shared prefixes, at the cost of attending within records.

A pack is one sequence of trees; a tree is a prefix with the rest of several records behind it, or
a record by itself. Records attend to their tree's prefix and to themselves. One dense mask says
that too, but costs the square of the pack's length. Here the records of all trees are laid side by
side, and Transformers' own scaled-dot-product attention does the rest.

Shapes: S tokens of the pack, P of a prefix, L of the longest rest, T trees with a prefix, B records
in all, H heads (keys and values may have fewer), C width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from memlaw.model.body import body_of
from memlaw.model.products import computes_in

_NAME = "memlaw_tree"
# PyTorch's fused attention on CPUs takes some 40 µs a head and record backwards, however short
# the record; up to about this length plain matrix products are quicker.
_SHORT = 128
_MEANINGFUL = {"position_bias", "softcap", "s_aux"}  # settings that change what is computed


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Records of similar length.

    Attributes:
        rest: [B, L] int64: places of each record's rest in the pack; filled up with its last one.
        owner: [B] int64: the tree of each record, among those with a prefix.
        mask: [1, 1, L, P + L] bool: what a token of the rest sees; None for records without prefix.
    """

    rest: Int64[Tensor, "B L"]
    owner: Int64[Tensor, "B"]
    mask: Bool[Tensor, "1 1 L P_L"] | None


@dataclass(frozen=True, kw_only=True)
class Trees:
    """Where the tokens of a pack stand.

    Attributes:
        prefix: [T, P] int64: places of the trees' prefixes in the pack.
        buckets: the records.
        back: [S] int64: where each token of the pack lies when prefixes and buckets, filled up,
            are laid one behind the other.
    """

    prefix: Int64[Tensor, "T P"]
    buckets: list[Bucket]
    back: Int64[Tensor, "S"]


def lay_out(
    n_prefix: int, trees: Sequence[tuple[bool, Sequence[int]]], device: torch.device
) -> Trees:
    """Describe a pack of trees, one behind the other.

    Args:
        n_prefix: P; may be 0.
        trees: for each tree whether it has a prefix, and the lengths of its records' rests, each at
            least 1.
        device: where the model is.
    """
    if all(len(tree) == 1 for _, tree in trees):  # nothing is shared
        trees = [(False, [n_prefix * has_prefix + tree[0]]) for has_prefix, tree in trees]
    prefix: list[list[int]] = []
    # Records by prefix and length: (tree, place, length)
    sorted_records: dict[tuple[bool, int], list[tuple[int, int, int]]] = {}
    at = 0
    for has_prefix, tree in trees:
        shared = has_prefix and n_prefix > 0
        if shared:
            prefix.append(list(range(at, at + n_prefix)))
            at += n_prefix
        for length in tree:
            alike = sorted_records.setdefault((shared, length.bit_length()), [])
            alike.append((len(prefix) - 1, at, length))
            at += length
    back = torch.empty(at, dtype=torch.long)
    places = torch.tensor(prefix, dtype=torch.long).view(len(prefix), n_prefix if prefix else 0)
    back[places.flatten()] = torch.arange(places.numel())
    first = places.numel()
    buckets = []
    for (shared, _), records in sorted_records.items():
        longest = max(length for _, _, length in records)
        rest = torch.empty(len(records), longest, dtype=torch.long)
        for row, (_, place, length) in enumerate(records):
            rest[row] = place + torch.arange(longest).clamp(max=length - 1)
            back[place : place + length] = first + row * longest + torch.arange(length)
        first += rest.numel()
        sees = torch.ones(longest, n_prefix + longest, dtype=torch.bool).tril(n_prefix)
        buckets.append(
            Bucket(
                rest=rest.to(device),
                owner=torch.tensor([number for number, _, _ in records], device=device),
                mask=sees[None, None].to(device) if shared else None,
            )
        )
    return Trees(prefix=places.to(device), buckets=buckets, back=back.to(device))


_trees: ContextVar[Trees] = ContextVar("trees")


@contextmanager
def tree_attention(model: Any, trees: Trees) -> Iterator[None]:
    """Within the block, the model attends along `trees`.

    Args:
        model: one for which `is_replaceable` holds; run on one sequence, without a mask.
        trees: of that sequence.
    """
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(_NAME, _attend)
    configs = _configs(model)
    token = _trees.set(trees)
    for config in configs:
        config._attn_implementation = _NAME
    try:
        yield
    finally:
        _trees.reset(token)
        for config in configs:
            config._attn_implementation = "sdpa"


def is_replaceable(model: Any) -> bool:
    """The model attends by Transformers' exchangeable scaled-dot-product function."""
    return all(getattr(c, "_attn_implementation", None) == "sdpa" for c in _configs(model))


def _configs(model: Any) -> list[Any]:
    found = [model.config, model.config.get_text_config(), body_of(model).config]
    return list({id(config): config for config in found}.values())


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Stands for `sdpa_attention_forward`: query [1, H, S, C] and so on to [1, S, H, C]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """To [rows · columns, H, C]."""
        if by_hand and query.shape[2] <= _SHORT:
            return _short_attention(query, key, value, mask, settings.get("scaling"))
        how = {**settings, "is_causal": mask is None}
        out, _ = sdpa_attention_forward(module, query, key, value, mask, **how)
        return out.flatten(0, 1)

    def lay(states: Tensor, places: Tensor) -> Tensor:
        """[1, H, S, C] to [rows, H, columns, C] for places [rows, columns]."""
        picked = states[0].index_select(1, places.flatten())
        return picked.unflatten(1, places.shape).transpose(0, 1)

    trees = _trees.get()
    by_hand = query.device.type == "cpu" and not _MEANINGFUL & settings.keys()
    parts = []
    if len(trees.prefix):
        prefix_key, prefix_value = lay(key, trees.prefix), lay(value, trees.prefix)
        parts.append(attend(lay(query, trees.prefix), prefix_key, prefix_value, None))
    for bucket in trees.buckets:
        keys, values = lay(key, bucket.rest), lay(value, bucket.rest)
        if bucket.mask is not None:
            keys = torch.cat([_of_records(prefix_key, bucket.owner), keys], dim=2)
            values = torch.cat([_of_records(prefix_value, bucket.owner), values], dim=2)
        parts.append(attend(lay(query, bucket.rest), keys, values, bucket.mask))
    return torch.cat(parts).index_select(0, trees.back)[None], None


def _of_records(by_tree: Tensor, owner: Tensor) -> Tensor:
    """[T, ...] to [B, ...]."""
    if len(by_tree) == 1:
        return by_tree.expand(len(owner), *by_tree.shape[1:])
    return by_tree.index_select(0, owner)


def _short_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Softmax attention written out: query [B, H, L, C] to [B·L, H, C]. No mask means causal."""
    b, h, n, width = query.shape
    m = key.shape[2]
    dtype, wide = query.dtype, computes_in(query.dtype)
    query, key, value = query.to(wide), key.to(wide), value.to(wide)
    if mask is None:
        mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril()
    # Heads that share keys and values are further rows of one product.
    rows = (query * (width**-0.5 if scaling is None else scaling)).reshape(
        b, key.shape[1], -1, width
    )
    scores = (rows @ key.mT).unflatten(2, (-1, n))  # [B, KV, H / KV, L, M]
    scores = scores.float().masked_fill(~mask.view(n, m), float("-inf"))
    weights = scores.softmax(dim=-1).to(query.dtype).flatten(2, 3)
    out = (weights @ value).view(b, h, n, width)
    return out.transpose(1, 2).flatten(0, 1).to(dtype)
