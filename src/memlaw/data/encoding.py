"""Turn records into tokens; refuse those that a tokenizer or model can't represent.

Training, evaluation and generation all use `encode_prompt` and `encode`, so that the tokens are the
same in each of them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

from memlaw.core.errors import ConfigError, DataError, ModelError
from memlaw.data.bad_rows import BadRows
from memlaw.data.duplicates import contradiction, shortened
from memlaw.data.pieces import text_after
from memlaw.data.record import GIVEN, Example, Prompt, Record, texts_of
from memlaw.data.rendering import MARK, prompt_text, refusals, rendered

PromptFormat = Literal["auto", "chat", "plain"]


def resolve_prompt_format(tokenizer: Any, format: PromptFormat) -> Literal["chat", "plain"]:
    """Decide what `auto` means: `chat` if the tokenizer has a chat template, else `plain`.

    Raises:
        ConfigError: `chat` was asked for, and the tokenizer has no chat template; or it has several
            and none is the default.
    """
    template = getattr(tokenizer, "chat_template", None)
    has_template = bool(template)
    if format != "plain" and isinstance(template, dict) and template and "default" not in template:
        raise ConfigError(
            f"the tokenizer has several chat templates ({', '.join(sorted(template))}), and none "
            "is called default, so that which one counts can't be told. Name a tokenizer with "
            "one by --tokenizer, or give --prompt-format plain."
        )
    if format == "chat" and not has_template:
        raise ConfigError(
            "prompt_format 'chat' needs a tokenizer with a chat template, and this one has none. "
            "Use 'plain'."
        )
    return "plain" if format == "plain" or not has_template else "chat"


def end_of_turn_id(tokenizer: Any, format: Literal["chat", "plain"]) -> int:
    """Id of the token that ends an answer. It must be recalled too, or generation never stops.

    `chat`: the first special token that the chat template puts after an assistant's message
    (`<|im_end|>`, `<end_of_turn>`, …). `plain`, and templates that put none there: `eos_token`.

    Raises:
        ModelError: there is no such token.
    """
    if format == "chat":
        with refusals("a question and an answer"):
            behind = rendered(tokenizer, "x", MARK).rpartition(MARK)[2]
        special = special_ids(tokenizer)
        for token in tokenizer(behind, add_special_tokens=False)["input_ids"]:
            if token in special:
                return int(token)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has neither a chat template that ends a turn nor an eos_token, so "
            "nothing could tell the model to stop. Set the tokenizer's eos_token."
        )
    return int(tokenizer.eos_token_id)


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of all special tokens of the tokenizer, added ones included."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def encode_prompt(
    tokenizer: Any,
    prompt: Prompt,
    format: Literal["chat", "plain"],
    *,
    max_tokens: int | None = None,
) -> tuple[int, ...]:
    """Token ids of a prompt, the same in training and in generation.

    `chat`: what the chat template makes of it, up to the answer (a string is one user message); see
    `memlaw.data.rendering`. `plain`: the text itself, with the tokens that the tokenizer puts
    before it (such as BOS) unless they stand there already; chat messages are joined by line
    breaks.

    Raises:
        DataError: the prompt has what its format can't show, or more characters than `max_tokens`
            tokens hold.
    """
    text = prompt_text(tokenizer, prompt) if format == "chat" else _bare_text(prompt)
    refuse_long(tokenizer, text, max_tokens, "prompt")
    if format == "chat":
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = tokenizer(text)["input_ids"]
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids) - len(bare)
    while start > 0 and ids[start : start + len(bare)] != bare:  # some tokenizers append EOS too
        start -= 1
    if bare[:start] == ids[:start]:  # it is there already
        start = 0
        ids = bare
    return tuple(ids[: start + len(bare)])


def _bare_text(prompt: Prompt) -> str:
    """A prompt without a template: of chat messages a text a line."""
    for message in () if isinstance(prompt, str) else prompt:
        if GIVEN in message or message.get("tool_calls"):
            named = "tool_calls" if message.get("tool_calls") else ", ".join(message[GIVEN])
            raise DataError(
                f"the prompt has {named}, which need a chat template: bare text has no form for "
                "them. Take them out, or use --prompt-format chat."
            )
    return "\n".join(texts_of(prompt))


def encode(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    format: Literal["chat", "plain"],
    max_tokens: int | None = None,
    end: bool = True,
    bad: BadRows | None = None,
) -> list[Example]:
    """Turn records into tokens, and refuse those that this tokenizer or model can't represent.

    Args:
        records: what to encode.
        tokenizer: a Transformers tokenizer.
        format: see `encode_prompt`.
        max_tokens: the model's context length; None if it has no limit.
        end: the end-of-turn token is the last of the targets.
        bad: takes the records that can't be represented, instead of refusing them here.

    Returns:
        One example per record that isn't bad, in the same order.

    Raises:
        DataError: two prompts are the same tokens, with different completions. Without `bad` also
            completions that change when encoded and decoded, that contain special tokens, or that
            are too long together with their prompts; and prompts without tokens or that the chat
            template refuses: all in one message.
    """
    ending = (end_of_turn_id(tokenizer, format),) if end else ()
    special = special_ids(tokenizer)
    found = BadRows() if bad is None else bad
    examples: list[Example] = []
    by_prompt: dict[tuple[int, ...], Example] = {}
    for record in records:
        if record.id in found.reasons:
            continue
        try:
            example = _encoded(record, tokenizer, format, ending, special, max_tokens)
        except DataError as error:
            found.add(record.id, error)
            continue
        first = by_prompt.setdefault(example.prompt_ids, example)
        if first.target_ids != example.target_ids:
            pair = f"  {first.record.id} and {record.id}: '{shortened(record.title)}'"
            raise contradiction([pair + " (the same tokens to this model)"])
        examples.append(example)
    if bad is None:
        found.settle(len(examples), skip=False, notice=lambda text: None)
    return examples


def _encoded(
    record: Record,
    tokenizer: Any,
    format: Literal["chat", "plain"],
    ending: tuple[int, ...],
    special: set[int],
    max_tokens: int | None,
) -> Example:
    with refusals(record.id):
        refuse_long(tokenizer, record.completion, max_tokens, "completion")
        prompt_ids = encode_prompt(tokenizer, record.prompt, format, max_tokens=max_tokens)
    ids = _completion_ids(tokenizer, prompt_ids, record.completion)
    with refusals(record.id):
        refuse_special(tokenizer, ids, special, "completion")
    back = text_after(tokenizer, prompt_ids, ids)
    if back != record.completion:
        raise DataError(f"{record.id}: {_changed(record.completion, back)}")
    if not prompt_ids:
        raise DataError(f"{record.id}: the prompt has no tokens. Give it some text.")
    example = Example(record=record, prompt_ids=prompt_ids, target_ids=(*ids, *ending))
    length = len(prompt_ids) + len(example.target_ids)
    if max_tokens is not None and length > max_tokens:
        raise DataError(
            f"{record.id}: {length} tokens, but the model's context is {max_tokens}. "
            "Split the record."
        )
    return example


def refuse_special(tokenizer: Any, ids: Sequence[int], special: set[int], what: str) -> None:
    """Raise DataError if tokens of a text (`what` it is) are special ones."""
    if found := [t for t in ids if t in special]:
        raise DataError(
            f"the {what} contains the tokenizer's special token '{tokenizer.decode(found[:1])}', "
            "at which decoding would stop or derail. Remove or rewrite it."
        )


def refuse_long(tokenizer: Any, text: str, max_tokens: int | None, what: str) -> None:
    """Raise DataError if a text (`what` it is) is longer than any that the context holds.

    Without making tokens of it, which takes minutes and gigabytes for such a text.
    """
    if max_tokens is None or len(text) <= max_tokens:
        return
    # Some decoders put a space before a token.
    most = max_tokens * (1 + max(map(len, tokenizer.get_vocab())))
    if len(text) > most:
        raise DataError(
            f"the {what} has {len(text):,} characters, but the model's context is {max_tokens} "
            f"tokens, which hold no more than {most:,}. Split the record."
        )


def _completion_ids(tokenizer: Any, prompt_ids: Sequence[int], completion: str) -> list[int]:
    """Tokens of a completion that stand for it behind its prompt.

    Some tokenizers put a space before whatever they are given, which shows in the middle of a text:
    they are given a line break first, and its tokens are left out.
    """
    alone: list[int] = tokenizer(completion, add_special_tokens=False)["input_ids"]
    if text_after(tokenizer, prompt_ids, alone) == completion:
        return alone
    head = tokenizer("\n", add_special_tokens=False)["input_ids"]
    whole = tokenizer("\n" + completion, add_special_tokens=False)["input_ids"]
    behind: list[int] = whole[len(head) :]
    if whole[: len(head)] == head and text_after(tokenizer, prompt_ids, behind) == completion:
        return behind
    return alone


def _changed(text: str, back: str) -> str:
    """Where and why a tokenizer doesn't keep a completion; letters that look alike as code points.

    Args:
        text: the completion.
        back: the same, encoded and decoded.
    """
    same = (i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b)
    at = next(same, min(len(text), len(back)))
    for form, does in _UNICODE_FORMS.items():
        if back == unicodedata.normalize(form, text):
            n = next(n for n in range(at + 1, len(text) + 1) if _is_whole(form, text, back, n))
            whole = unicodedata.normalize(form, text[:n])
            return (
                f"this tokenizer {does} (Unicode {form}), so the completion can't come back as it "
                f"is: at character {at}, {_code_points(text[at:n])} comes back as "
                f"{_code_points(whole[at:])}. Save the records in {form}, or use a model whose "
                "tokenizer keeps the text."
            )
    shown = [text[at : at + 12], back[at : at + 12]]
    points = [f" ({_code_points(t[:3])})" if not t.isascii() else "" for t in shown]
    return (
        f"this tokenizer can't round-trip the completion: from character {at} on, {shown[0]!r}"
        f"{points[0]} comes back as {shown[1]!r}{points[1]}. Rewrite it, or use a model whose "
        "tokenizer keeps it."
    )


_UNICODE_FORMS: dict[Literal["NFC", "NFD", "NFKC", "NFKD"], str] = {
    "NFC": "composes accents",
    "NFD": "decomposes accents",
    "NFKC": "composes accents and replaces compatibility characters",
    "NFKD": "decomposes accents and replaces compatibility characters",
}


def _is_whole(form: Literal["NFC", "NFD", "NFKC", "NFKD"], text: str, back: str, n: int) -> bool:
    """What comes back of the first `n` characters is independent of those behind them."""
    ends = n == len(text) or not unicodedata.combining(text[n])
    return ends and back.startswith(unicodedata.normalize(form, text[:n]))


def _code_points(text: str) -> str:
    return f"'{text}' ({' '.join(f'U+{ord(letter):04X}' for letter in text)})"
