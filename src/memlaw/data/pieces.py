"""Tokens as text where they stand: pieces that put together are the text, whatever the tokenizer.

Decoded one by one, tokens lose SentencePiece's spaces, and a character of several tokens is several
replacement characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BEFORE = 16  # tokens before, which settle how a text begins
_PART = "\ufffd"  # what a part of a character is decoded to


def text_after(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that tokens stand for behind others.

    Args:
        tokenizer: theirs.
        before: what stands there; may be empty.
        ids: the tokens.
    """
    context = list(before[-_BEFORE:])
    start, whole = _decoded(tokenizer, context), _decoded(tokenizer, [*context, *ids])
    if context and whole.startswith(start):
        return whole[len(start) :]
    return _decoded(tokenizer, ids)


def text_with(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of tokens and of a few before them: to compare, where a character may be cut."""
    return _decoded(tokenizer, [*before[-_BEFORE:], *ids])


def pieces(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> list[str]:
    """A text for each token; put together they are `text_after` of all.

    A character of several tokens belongs to the last of them; the others are empty.
    """
    context = list(before[-_BEFORE:])
    found: list[str] = []
    window, start = context, _decoded(tokenizer, context)  # what is told, and its text
    for n, token in enumerate(ids):
        window = [*window, token]
        whole = _decoded(tokenizer, window)
        if whole.endswith(_PART) and n + 1 < len(ids):
            found.append("")
            continue
        if start and whole.startswith(start):
            found.append(whole[len(start) :])
        else:
            found.append(whole if not start else _decoded(tokenizer, [token]))
        window = window[-_BEFORE:]
        start = _decoded(tokenizer, window)
    return found


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    if not ids:
        return ""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
