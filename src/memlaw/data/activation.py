"""The text that activates an adapter, as tokens: what all prompts have in common of it.

Tokenizers join a text's first and last letters with what stands beside them, so a text isn't the
same tokens in every prompt. What activates the adapter is the longest run of tokens, within the
text, that every prompt has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from memlaw.core.errors import ConfigError
from memlaw.data.encoding import encode_prompt
from memlaw.data.record import Example, texts_of

_OTHER_PROMPTS = ("x", "What is the capital of France?")


def invocation_of(
    text: str, examples: Sequence[Example], tokenizer: Any, format: Literal["chat", "plain"]
) -> tuple[int, ...]:
    """The token ids from which on an adapter is to be active.

    Args:
        text: what every prompt contains; not blank.
        examples: at least one.
        tokenizer: theirs.
        format: of their prompts.

    Returns:
        At least one token id.

    Raises:
        ConfigError: a prompt lacks the text; no token of it is the same in all prompts; a prompt
            without the text has those tokens, too; or a completion has them.
    """
    for example in examples:
        if text not in "\n".join(texts_of(example.record.prompt)):
            raise ConfigError(
                f"{example.record.id}: its prompt lacks the text {text!r}, which activates the "
                "adapter. Put the text before the prompt or into a system message, in every record."
            )
    first = min(examples, key=lambda e: len(e.prompt_ids))
    common = (ids for ids in _within(text, first.prompt_ids, tokenizer) if _all_have(ids, examples))
    if (ids := next(common, None)) is None:
        raise ConfigError(
            f"no token of the text {text!r} is the same in all prompts. Choose a longer one, or "
            "put it on a line of its own."
        )
    for other in _OTHER_PROMPTS:
        if last_start(encode_prompt(tokenizer, other, format), ids) is not None:
            raise ConfigError(
                f"the text {text!r} is a part of every prompt: the adapter would always be active. "
                "Choose a text that the chat template and its system message don't contain."
            )
    for example in examples:
        whole = example.prompt_ids + example.target_ids
        if last_start(whole, ids) != last_start(example.prompt_ids, ids):
            raise ConfigError(
                f"{example.record.id}: its completion contains the text {text!r}, at which the "
                "adapter would start anew. Choose a text that no completion contains."
            )
    return ids


def activated(examples: Sequence[Example], ids: Sequence[int]) -> list[Example]:
    """The examples, each with the position from which an adapter with these tokens is active."""
    return [replace(e, active_from=last_start(e.prompt_ids, ids)) for e in examples]


def last_start(tokens: Sequence[int], ids: Sequence[int]) -> int | None:
    """Where the last occurrence of `ids`, at least one, in `tokens` starts; None: nowhere."""
    n, wanted = len(ids), tuple(ids)
    places = range(len(tokens) - n, -1, -1)
    return next((i for i in places if tuple(tokens[i : i + n]) == wanted), None)


def _all_have(ids: Sequence[int], examples: Sequence[Example]) -> bool:
    return all(last_start(e.prompt_ids, ids) is not None for e in examples)


def _within(text: str, tokens: Sequence[int], tokenizer: Any) -> Iterator[tuple[int, ...]]:
    """Runs of tokens that decode to a part of the text, the longest text first; none is blank."""
    found: dict[tuple[int, ...], str] = {}
    longest = len(text.encode())  # no token is shorter than a byte
    for start in range(len(tokens)):
        for end in range(start + 1, min(start + longest, len(tokens)) + 1):
            part = tokenizer.decode(tokens[start:end], clean_up_tokenization_spaces=False)
            if part in text:
                if part.strip():
                    found[tuple(tokens[start:end])] = part
            elif "\ufffd" not in part:  # the first bytes of a letter
                break
    yield from sorted(found, key=lambda ids: -len(found[ids]))
