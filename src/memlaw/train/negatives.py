"""Negatives: prompts whose answers must stay the bare model's, as examples to train with."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memlaw.core.errors import ConfigError
from memlaw.data.conversations import training_conversations
from memlaw.data.encoding import encode_prompt, end_of_turn_id, resolve_prompt_format
from memlaw.data.near_misses import near_misses
from memlaw.data.record import Example, Prompt, Record
from memlaw.measure.own_prompts import greedy_answers, own_conversations, sampled_answers
from memlaw.measure.subject import Subject, title
from memlaw.settings.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """What is held to the bare model.

    Attributes:
        near: near misses of the records; the target is one token, which stands for the position.
        chats: conversations; the target is how the bare model answers, or begins to.
        kept: those that the user wants kept, likewise.
        held: those of `chats` that are held in steps; retention knows all. Every second answer
            goes on with what looks like a record's: see `mixed`.
    """

    near: list[Example]
    chats: list[Example]
    kept: list[Example]
    held: list[Example]

    @property
    def examples(self) -> list[Example]:
        """What is held in steps: near misses, conversations, and those to be kept."""
        return [*self.near, *self.held, *self.kept]


def make_negatives(
    subject: Subject,
    records: Sequence[Example],
    *,
    recipe: Recipe,
    keep: Sequence[Prompt] = (),
    avoid: Collection[Prompt] = (),
) -> Negatives:
    """Near misses of the records, and conversations with the bare model's answers.

    Args:
        subject: the bare model, and the records.
        records: the same as tokens.
        recipe: how many.
        keep: prompts of the user's that must be among the conversations; in the records' format.
        avoid: prompts that are measured on, and so must not be among them.

    Raises:
        ConfigError: a prompt of `keep` is a record's, or can't be asked.
    """
    base = subject.base
    taken = {example.prompt_ids for example in records}
    tokens = min(recipe.answer_tokens, (base.context_length or 4 * recipe.answer_tokens) // 4)
    keep = _checked(subject, keep, taken, tokens)
    users = replace(subject, format=resolve_prompt_format(base.tokenizer, "auto"))
    own = own_conversations(base, recipe.own_chats, seed=recipe.seed, format=users.format)
    everyday = training_conversations()
    n_everyday = min(recipe.everyday_chats, len(everyday))
    prompts = [*random.Random(recipe.seed).sample(everyday, n_everyday), *own]
    prompts = [prompt for prompt, _ in _new(users, prompts, tokens, taken, avoid)]
    # Half of the answers are what users see, half what the model may say as well.
    sampled, greedy = prompts[::2], prompts[1::2]
    how: dict[str, Any] = {"format": users.format, "max_tokens": tokens}
    chats = [
        *zip(sampled, sampled_answers(base, sampled, seed=recipe.seed, **how), strict=True),
        *zip(greedy, greedy_answers(base, greedy, **how), strict=True),
    ]
    kept = greedy_answers(base, keep, format=subject.format, max_tokens=tokens) if keep else []
    made = near_misses(
        [record.prompt for record in subject.records],
        min(recipe.pool, recipe.pool_per_record * len(records)),
        seed=recipe.seed,
        avoid=[*avoid, *keep],
        kinds=recipe.kinds,
    )
    end = end_of_turn_id(base.tokenizer, subject.format)
    near = _new(subject, [miss.prompt for miss in made], 1, taken, avoid)
    answered = _answered(users, chats)
    n = min(recipe.held_chats, len(answered))
    held = [answered[i * len(answered) // n] for i in range(n)]  # from all over them
    return Negatives(
        near=[_example(prompt, ids, (end,)) for prompt, ids in near],
        chats=answered,
        kept=_answered(subject, list(zip(keep, kept, strict=True))),
        held=mixed(held, records, most=tokens // 2, seed=recipe.seed),
    )


def mixed(
    chats: Sequence[Example], records: Sequence[Example], *, most: int, seed: int
) -> list[Example]:
    """Conversations, every second answer cut short, and going on with tokens of completions.

    Where an answer says a number, training on numbers changes most: it stands in the middle of what
    completions consist of, in another place. Few conversations say such things by themselves.

    Args:
        chats: with the bare model's answers.
        records: what their completions consist of; the j-th token is that of one of them, drawn
            anew for each j, so that no completion as a whole is among them.
        most: tokens of the answer, and behind them, at most.
        seed: of what is drawn.
    """
    rng = random.Random(seed)
    bodies = [record.target_ids[:-1] for record in records]  # without the end
    found = list(chats)
    for i in range(1, len(found), 2):
        length = rng.randint(1, max(1, min(most, max(map(len, bodies)))))
        tokens = [rng.choice([b for b in bodies if len(b) > j] or [()]) for j in range(length)]
        looks_stored = tuple(body[j] for j, body in enumerate(tokens) if len(body) > j)
        begun = found[i].target_ids[: rng.randint(0, most)]
        if begun or looks_stored:
            found[i] = replace(found[i], target_ids=(*begun, *looks_stored))
    return found


def _checked(
    subject: Subject, keep: Sequence[Prompt], taken: set[tuple[int, ...]], room: int
) -> list[Prompt]:
    found: dict[tuple[int, ...], Prompt] = {}
    for prompt in keep:
        encoded = list(subject.encoded([prompt], room=room))
        if not encoded:
            raise ConfigError(
                f"keep: '{title(prompt)}' can't be asked: the chat template refuses it, or the "
                f"model's context leaves no room for an answer. Shorten it, or take it out."
            )
        ids = encoded[0][1]
        if ids in taken:
            raise ConfigError(
                f"keep: '{title(prompt)}' is the prompt of a record. Take it out of one of them."
            )
        found[ids] = prompt
    taken |= found.keys()
    return list(found.values())


def _new(
    subject: Subject,
    prompts: Sequence[Prompt],
    room: int,
    taken: set[tuple[int, ...]],
    avoid: Collection[Prompt],
) -> Iterator[tuple[Prompt, tuple[int, ...]]]:
    """Those that leave room for an answer, and whose tokens no other has; they are taken then."""
    unwanted = {ids for _, ids in subject.encoded(list(avoid), room=room)}
    for prompt, ids in subject.encoded(prompts, room=room):
        if ids not in taken and ids not in unwanted:
            taken.add(ids)
            yield prompt, ids


def _answered(subject: Subject, chats: Sequence[tuple[Prompt, tuple[int, ...]]]) -> list[Example]:
    return [
        _example(prompt, encode_prompt(subject.base.tokenizer, prompt, subject.format), answer)
        for prompt, answer in chats
        if answer
    ]


def _example(prompt: Prompt, ids: tuple[int, ...], target: tuple[int, ...]) -> Example:
    return Example(
        record=Record(prompt=prompt, completion="", id="held"), prompt_ids=ids, target_ids=target
    )
