"""What a base model writes and answers itself: computed once, and kept on disk.

Where nothing else is known of a model's users, what the model itself expects of them is the best
guess: it works for any language and needs no data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from memlaw.core.files import json_sha256
from memlaw.data.encoding import encode_prompt, end_of_turn_id
from memlaw.data.record import Prompt
from memlaw.data.rendering import MARK, rendered, rendering_of
from memlaw.measure.decode import greedy_decode, sample_decode
from memlaw.model.base import BaseModel
from memlaw.model.cache import Kept, kept

ANSWER_TOKENS = 32
N_MEASURED, MEASURING_SEED = 200, 990_001
Format = Literal["chat", "plain"]
_TURN_TOKENS = {"chat": 24, "plain": 12}
_LEAST_P = 0.001  # cuts the tail as top-p does, without sorting a vocabulary for each token
_ROUNDS = 8  # a model that only repeats itself is asked no more often
_BATCH = 64


def own_conversations(base: BaseModel, n: int, *, seed: int, format: Format) -> list[str]:
    """User turns that the base model writes itself, sampled, each of them once.

    Args:
        base: the base model, without an adapter.
        n: how many, ≥ 1.
        seed: random seed; another seed gives others.
        format: `chat`: what stands between the template's head and a user's end of turn, at most 24
            tokens. `plain`: how texts begin, 12 tokens from the token that begins or ends a text.

    Returns:
        At most n texts, none blank: a model that repeats itself gives fewer. From the cache, if
        they were sampled before.
    """

    def make() -> Kept:
        head, end = _head(base.tokenizer, format), end_of_turn_id(base.tokenizer, format)
        found: dict[str, None] = {}
        for i in range(_ROUNDS):
            if len(found) >= n:
                break
            size = min(n, 2 * _BATCH)
            answers = sample_decode(
                base.model,
                [head] * size,
                end_id=end,
                max_tokens=[_TURN_TOKENS[format]] * size,
                seed=(seed << 8) + i,
                least_p=_LEAST_P,
            )
            texts = base.tokenizer.batch_decode(answers, skip_special_tokens=True)
            found |= dict.fromkeys(text.strip() for text in texts if text.strip())
        return Kept(list(found)[:n], {})

    settings: dict[str, Any] = {
        "n": n,
        "seed": seed,
        "format": format,
        "tokens": _TURN_TOKENS,
        "least_p": _LEAST_P,
    }
    if arguments := rendering_of(base.tokenizer).arguments:
        settings["template_args"] = dict(arguments)
    return list(kept(base, "own-prompts", settings, make).content)


def greedy_answers(
    base: BaseModel, prompts: Sequence[Prompt], *, format: Format, max_tokens: int = ANSWER_TOKENS
) -> list[tuple[int, ...]]:
    """The base model's greedy answers, as token ids, the end of turn included where it came.

    Args:
        base: the base model, without an adapter.
        prompts: what it is asked.
        format: how prompts become tokens.
        max_tokens: most tokens of an answer, ≥ 1.
    """

    def decode(rows: list[tuple[int, ...]], end: int, _: int) -> list[tuple[int, ...]]:
        limits = [max_tokens] * len(rows)
        return greedy_decode(base.model, rows, end_id=end, max_tokens=limits, together=True)

    return _answers(base, prompts, format, decode, {"how": "greedy", "max_tokens": max_tokens})


def sampled_answers(
    base: BaseModel,
    prompts: Sequence[Prompt],
    *,
    format: Format,
    seed: int,
    max_tokens: int = ANSWER_TOKENS,
) -> list[tuple[int, ...]]:
    """Answers drawn from the base model's own distribution, at temperature 1; as `greedy_answers`.

    Args:
        base, prompts, format, max_tokens: see `greedy_answers`.
        seed: random seed.
    """

    def decode(rows: list[tuple[int, ...]], end: int, place: int) -> list[tuple[int, ...]]:
        limits = [max_tokens] * len(rows)
        return sample_decode(
            base.model, rows, end_id=end, max_tokens=limits, seed=(seed << 16) + place
        )

    settings = {"how": "sampled", "seed": seed, "max_tokens": max_tokens}
    return _answers(base, prompts, format, decode, settings)


def _answers(
    base: BaseModel,
    prompts: Sequence[Prompt],
    format: Format,
    decode: Callable[[list[tuple[int, ...]], int, int], list[tuple[int, ...]]],
    settings: dict[str, Any],
) -> list[tuple[int, ...]]:
    ids = [encode_prompt(base.tokenizer, prompt, format) for prompt in prompts]

    def make() -> Kept:
        end = end_of_turn_id(base.tokenizer, format)
        by_length = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
        found: dict[int, tuple[int, ...]] = {}
        for place in range(0, len(ids), _BATCH):
            rows = by_length[place : place + _BATCH]
            found.update(zip(rows, decode([ids[i] for i in rows], end, place), strict=True))
        return Kept([found[i] for i in range(len(ids))], {})

    settings = settings | {"prompts": json_sha256(ids), "batch": _BATCH}
    return [tuple(answer) for answer in kept(base, "answers", settings, make).content]


def _head(tokenizer: Any, format: Format) -> tuple[int, ...]:
    """The tokens after which a user's first turn, or a text, begins."""
    if format == "chat":
        text = rendered(tokenizer, MARK).partition(MARK)[0]
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    first = tokenizer.bos_token_id
    return (end_of_turn_id(tokenizer, format) if first is None else first,)


def measured_prompts(base: BaseModel, *, format: Format) -> list[str]:
    """The 200 prompts that harm is measured on, which the base model writes itself.

    Training must not see them: its own come from another seed, and these are left out of them.

    Args:
        base: the base model, without an adapter.
        format: as in `own_conversations`.
    """
    return own_conversations(base, N_MEASURED, seed=MEASURING_SEED, format=format)
