"""Where users are: the texts on which retention holds an adapter down, over all sites together.

Three domains: general text, what the base model writes itself, and answers in chats. What its sites
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
from memlaw.data.record import Example
from memlaw.measure.decode import sample_decode
from memlaw.model.base import BaseModel
from memlaw.model.cache import Kept, kept
from memlaw.model.sites import Site
from memlaw.settings.recipe import Recipe
from memlaw.train.joint import joint_samples

_Text = tuple[Sequence[int], int]  # token ids, and from which position on they are looked at
_TEXT_BEGINS = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>")


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Samples of all sites at the same positions, divided by the root of their number.

    Attributes:
        share: what it counts in retention; all of them together 1.
        reads: what each site reads, [n, D_in].
        writes: the gradient of sampled text's log-likelihood at each site's output, [n, D_out].
    """

    share: float
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
        chats: lists of conversations with answers, which are looked at from where each begins.
        recipe: how much text of its own the model writes, and what chats count; and the seed.
    """
    texts: list[list[_Text]] = [
        [(window, 0) for window in retained.tolist()],
        [(text, 1) for text in _own_text(base, recipe)],
    ]
    answers: list[list[_Text]] = [
        [(chat.prompt_ids + chat.target_ids, len(chat.prompt_ids) - 1) for chat in part]
        for part in chats
    ]
    texts, answers = ([p for p in map(_long_enough, parts) if p] for parts in (texts, answers))
    share = recipe.chat_share if answers else 0.0
    return [
        _measured(base, sites, part, recipe, most=most, share=of_kind / len(parts))
        for parts, most, of_kind in (
            (texts, recipe.most_positions, 1 - share),
            (answers, recipe.most_chat_positions, share),
        )
        for part in parts
    ]


def _long_enough(part: Sequence[_Text]) -> list[_Text]:
    """Those in which something is looked at: not the last token, which nothing follows."""
    return [(ids, first) for ids, first in part if len(ids) > first + 1]


def _measured(
    base: BaseModel,
    sites: Sequence[Site],
    part: Sequence[_Text],
    recipe: Recipe,
    *,
    most: int,
    share: float,
) -> Domain:
    """One domain, from the cache if it was measured before."""
    sequences, first = zip(*part, strict=True)

    def make() -> Kept:
        reads, writes = joint_samples(
            base.model, sites, sequences, first=first, seed=recipe.seed, most=most
        )
        # What the model computes in its dtype is kept in it: nothing is lost.
        tensors = {f"reads.{i}": x.to(base.model.dtype) for i, x in enumerate(reads)}
        tensors |= {f"writes.{i}": g.to(base.model.dtype) for i, g in enumerate(writes)}
        return Kept(None, tensors)

    settings: dict[str, Any] = {
        "sites": [site.module for site in sites],
        "text": json_sha256([list(sequence) for sequence in sequences]),
        "first": first if len(set(first)) > 1 else first[0],
        "seed": recipe.seed,
        "most": most,
    }
    if len({site.layer for site in sites}) < len(sites):
        settings["probes"] = "by name"  # what was kept before may have mixed those of one layer
    tensors = kept(base, "moments", settings, make).tensors

    def of(name: str) -> list[Tensor]:
        parts = (tensors[f"{name}.{i}"] for i in range(len(sites)))
        return [x.to(base.model.device).float() / len(x) ** 0.5 for x in parts]

    return Domain(share=share, reads=of("reads"), writes=of("writes"))


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
