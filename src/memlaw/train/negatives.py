"""Negatives: prompts whose answers must stay the bare model's, as examples to train with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from memlaw.core.errors import ConfigError
from memlaw.data.conversations import training_conversations
from memlaw.data.encoding import encode_prompt, end_of_turn_id, resolve_prompt_format
from memlaw.data.near_misses import near_misses
from memlaw.data.record import Example, Prompt, Record
from memlaw.measure.own_prompts import greedy_answers, own_conversations, sampled_answers
from memlaw.model.base import BaseModel
from memlaw.settings.recipe import Recipe

Format = Literal["chat", "plain"]


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """What is held to the bare model.

    Attributes:
        near: near misses of the records; the target is one token, which stands for the position.
        chats: conversations; the target is how the bare model answers, or begins to.
        kept: those that the user wants kept, likewise.
    """

    near: list[Example]
    chats: list[Example]
    kept: list[Example]

    @property
    def examples(self) -> list[Example]:
        """All of them, in this order."""
        return [*self.near, *self.chats, *self.kept]


def make_negatives(
    base: BaseModel,
    records: Sequence[Example],
    *,
    format: Format,
    recipe: Recipe,
    keep: Sequence[Prompt] = (),
    avoid: Collection[Prompt] = (),
) -> Negatives:
    """Near misses of the records, and conversations with the bare model's answers.

    Args:
        base: the bare model.
        records: as tokens.
        format: how their prompts became tokens.
        recipe: how many.
        keep: prompts of the user's that must be among the conversations; in the records' format.
        avoid: prompts that are measured on, and so must not be among them.

    Raises:
        ConfigError: a prompt of `keep` is a record's, or too long for the model.
    """
    taken = {example.prompt_ids for example in records}
    tokens = min(recipe.answer_tokens, (base.context_length or 4 * recipe.answer_tokens) // 4)
    keep = _checked(base, keep, format, taken, tokens)
    chat_format = resolve_prompt_format(base.tokenizer, "auto")
    prompts: list[Prompt] = [*training_conversations()]
    prompts += own_conversations(base, recipe.own_chats, seed=recipe.seed, format=chat_format)
    prompts = [
        prompt
        for prompt, ids in _new(base, prompts, chat_format, taken, avoid)
        if _fits(base, ids, tokens)
    ]
    # Half of the answers are what users see, half what the model may say as well.
    sampled, greedy = prompts[::2], prompts[1::2]
    drawn = sampled_answers(base, sampled, format=chat_format, seed=recipe.seed, max_tokens=tokens)
    first = greedy_answers(base, greedy, format=chat_format, max_tokens=tokens)
    asked = greedy_answers(base, keep, format=format, max_tokens=tokens) if keep else []
    made = near_misses(
        [example.record.prompt for example in records],
        recipe.pool,
        seed=recipe.seed,
        avoid=[*avoid, *keep],
        kinds=recipe.kinds,
    )
    end = end_of_turn_id(base.tokenizer, format)
    near = [
        _example(prompt, ids, (end,))
        for prompt, ids in _new(base, [miss.prompt for miss in made], format, taken, avoid)
        if _fits(base, ids, 1)
    ]
    return Negatives(
        near=near,
        chats=[
            *_answered(base, sampled, drawn, chat_format),
            *_answered(base, greedy, first, chat_format),
        ],
        kept=_answered(base, keep, asked, format),
    )


def _checked(
    base: BaseModel, keep: Sequence[Prompt], format: Format, taken: set[tuple[int, ...]], n: int
) -> list[Prompt]:
    found: dict[tuple[int, ...], Prompt] = {}
    for prompt in keep:
        ids = encode_prompt(base.tokenizer, prompt, format)
        if ids in taken:
            raise ConfigError(
                f"keep: '{_title(prompt)}' is the prompt of a record. Take it out of one of them."
            )
        if not _fits(base, ids, n):
            raise ConfigError(
                f"keep: '{_title(prompt)}' has {len(ids)} tokens, and the model's context of "
                f"{base.context_length} leaves no room for an answer. Shorten it."
            )
        found[ids] = prompt
    taken |= found.keys()
    return list(found.values())


def _new(
    base: BaseModel,
    prompts: Sequence[Prompt],
    format: Format,
    taken: set[tuple[int, ...]],
    avoid: Collection[Prompt],
) -> Iterator[tuple[Prompt, tuple[int, ...]]]:
    """Those whose tokens no other prompt has; they are taken from then on."""
    unwanted = {encode_prompt(base.tokenizer, prompt, format) for prompt in avoid}
    for prompt in prompts:
        ids = encode_prompt(base.tokenizer, prompt, format)
        if ids and ids not in taken and ids not in unwanted:
            taken.add(ids)
            yield prompt, ids


def _fits(base: BaseModel, ids: Sequence[int], n: int) -> bool:
    """There is room for n more tokens."""
    return base.context_length is None or len(ids) + n <= base.context_length


def _answered(
    base: BaseModel,
    prompts: Sequence[Prompt],
    answers: Sequence[tuple[int, ...]],
    format: Format,
) -> list[Example]:
    return [
        _example(prompt, encode_prompt(base.tokenizer, prompt, format), answer)
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer
    ]


def _example(prompt: Prompt, ids: tuple[int, ...], target: tuple[int, ...]) -> Example:
    return Example(
        record=Record(prompt=prompt, completion="", id="held"), prompt_ids=ids, target_ids=target
    )


def _title(prompt: Prompt) -> str:
    return Record(prompt=prompt, completion="", id="held").title
