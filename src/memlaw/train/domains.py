"""Where users are: the texts on which retention holds an adapter down, over all sites together.

Three domains: general text, what the base model writes itself, and its own chats. What its sites
read there, and the gradients at their outputs, depend on the base model alone: they are kept on
disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float32, Int64
from torch import Tensor

from memlaw.core.files import json_sha256
from memlaw.data.encoding import encode_prompt, resolve_prompt_format
from memlaw.data.record import Example
from memlaw.measure.decode import sample_decode
from memlaw.model.base import BaseModel
from memlaw.model.cache import Kept, kept
from memlaw.model.sites import Site
from memlaw.settings.recipe import Recipe
from memlaw.train.joint import joint_samples

_TEXT_BEGINS = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>")
_MOST_CHATS = 600


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Samples of all sites at the same positions, divided by the root of their number.

    Attributes:
        reads: what each site reads, [n, D_in].
        writes: the gradient of sampled text's log-likelihood at each site's output, [n, D_out].
    """

    reads: list[Float32[Tensor, "n _"]]
    writes: list[Float32[Tensor, "n _"]]


def measure_domains(
    base: BaseModel,
    sites: Sequence[Site],
    retained: Int64[Tensor, "W S"],
    chats: Sequence[Sequence[Example]],
    *,
    recipe: Recipe,
) -> list[Domain]:
    """The samples of general text, of the model's own, and of each list of chats.

    Args:
        base: the bare model, no adapter attached.
        sites: where.
        retained: windows of general text.
        chats: lists of conversations with answers. Of each list some are looked at, from all over
            it, in which nothing but the conversation follows what the chat template begins with.
        recipe: how much text of its own the model writes; and the seed.
    """
    head = _head(base)
    alike = [[c.prompt_ids + c.target_ids for c in part] for part in chats]
    alike = [[ids for ids in part if ids[: len(head)] == head] for part in alike]
    domains: list[tuple[Sequence[Sequence[int]], int]] = [
        (retained.tolist(), 0),
        (_own_text(base, recipe), 1),
        *((part[:: -(-len(part) // _MOST_CHATS)], len(head)) for part in alike if part),
    ]
    found = []
    for sequences, first in domains:
        if long_enough := [sequence for sequence in sequences if len(sequence) > first]:
            found.append(_measured(base, sites, long_enough, first, recipe))
    return found


def _measured(
    base: BaseModel,
    sites: Sequence[Site],
    sequences: Sequence[Sequence[int]],
    first: int,
    recipe: Recipe,
) -> Domain:
    """One domain, from the cache if it was measured before."""

    def make() -> Kept:
        reads, writes = joint_samples(
            base.model,
            sites,
            sequences,
            first=first,
            seed=recipe.seed,
            most=recipe.most_positions,
        )
        # What the model computes in its dtype is kept in it: nothing is lost.
        tensors = {f"reads.{i}": x.to(base.model.dtype) for i, x in enumerate(reads)}
        tensors |= {f"writes.{i}": g.to(base.model.dtype) for i, g in enumerate(writes)}
        return Kept(None, tensors)

    settings: dict[str, Any] = {
        "sites": [site.module for site in sites],
        "text": json_sha256([list(sequence) for sequence in sequences]),
        "first": first,
        "seed": recipe.seed,
        "most": recipe.most_positions,
    }
    tensors = kept(base, "moments", settings, make).tensors

    def of(name: str) -> list[Tensor]:
        parts = (tensors[f"{name}.{i}"] for i in range(len(sites)))
        return [x.to(base.model.device).float() / len(x) ** 0.5 for x in parts]

    return Domain(reads=of("reads"), writes=of("writes"))


def _own_text(base: BaseModel, recipe: Recipe) -> list[tuple[int, ...]]:
    """Running text that the base model writes, sampled; from the cache if it was before."""
    tokenizer = base.tokenizer
    words = tokenizer.get_vocab()
    names = [name for name in _TEXT_BEGINS if name in words]
    start = words[names[0]] if names else tokenizer.bos_token_id or tokenizer.eos_token_id
    n = min(recipe.text_tokens, base.context_length or recipe.text_tokens) - 1

    def make() -> Kept:
        texts = sample_decode(
            base.model,
            [(start,)] * recipe.text_windows,
            end_id=tokenizer.eos_token_id,
            max_tokens=[n] * recipe.text_windows,
            seed=recipe.seed,
        )
        return Kept([(start, *text) for text in texts], {})

    settings = {"n": recipe.text_windows, "tokens": n, "start": start, "seed": recipe.seed}
    return [tuple(text) for text in kept(base, "own-text", settings, make).content]


def _head(base: BaseModel) -> tuple[int, ...]:
    """The tokens that the chat template puts before what a user says first; none without one."""
    format = resolve_prompt_format(base.tokenizer, "auto")
    one, other = (encode_prompt(base.tokenizer, text, format) for text in ("a", "b"))
    n = next((n for n, (i, j) in enumerate(zip(one, other, strict=False)) if i != j), 0)
    return one[:n]
