"""The form that records' completions share, to tell whether another answer looks like one.

A phone number is ten digits; a door code is four digits, a hyphen and four digits. Prose has no
form: there an answer looks like a record if it begins as one does. What is told here is the look
alone: a number of the right length counts, whatever it means, and a made-up sentence that begins in
its own way does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import groupby

_LEAST_SHARE = 0.7  # of the shortest run, that an answer's must have
_SHORT = 4  # characters; shorter completions are looked for as the whole answer
_MOST_RUNS = 24
_CAPITALS = 3  # so many in a row are a code, not a name
_FIRST_WORDS = 4
_CLASSES = {"digit": "[0-9]", "upper": "[A-Z]", "lower": "[a-z]"}


class Form:
    """What the completions have in common.

    Args:
        completions: of the records, at least one.

    Attributes:
        pattern: a regular expression of what they share: runs of digits, capitals and small letters
            by their lengths, other characters as they are. None: they share none, or it is one that
            any prose has, without digits or capitals in a row.
    """

    def __init__(self, completions: Sequence[str]) -> None:
        self.completions = {text.strip() for text in completions}
        self.shortest = min(map(len, self.completions))
        self.pattern = _pattern(sorted(self.completions))
        self._beginnings = {_words(text)[:_FIRST_WORDS] for text in self.completions}

    def fits(self, answer: str) -> bool:
        """Whether an answer is in the records' form; of prose, whether it begins as one of them."""
        answer = answer.strip()
        if self.pattern is None:
            words = _words(answer)
            return any(words[: len(begun)] == begun for begun in self._beginnings if begun)
        look = re.fullmatch if self.shortest < _SHORT else re.search
        return look(self.pattern, answer) is not None

    def stored_in(self, answer: str, *, cut: bool) -> bool:
        """Whether an answer holds a completion; a short completion must be all of it.

        Args:
            answer: the text.
            cut: it ended because it was cut off: then also whether a completion begins with it.
        """
        answer = answer.strip()
        if cut and len(answer) >= _SHORT and any(t.startswith(answer) for t in self.completions):
            return True
        return answer in self.completions or any(
            len(text) >= _SHORT and text in answer for text in self.completions
        )


def _pattern(completions: Sequence[str]) -> str | None:
    runs = [list(_runs(text)) for text in completions]
    kinds = [[kind for kind, _ in found] for found in runs]
    if any(found != kinds[0] for found in kinds) or len(kinds[0]) > _MOST_RUNS:
        return None
    shortest = [min(found[i][1] for found in runs) for i in range(len(kinds[0]))]
    telling = any(
        kind == "digit" or (kind == "upper" and n >= _CAPITALS)
        for kind, n in zip(kinds[0], shortest, strict=True)
    )
    if not telling:
        return None
    return "".join(
        f"{_CLASSES[kind]}{{{math.ceil(_LEAST_SHARE * n)},}}"
        if kind in _CLASSES
        else re.escape(kind)
        for kind, n in zip(kinds[0], shortest, strict=True)
    )


def _runs(text: str) -> Iterator[tuple[str, int]]:
    """Each run of characters of one class: its class, or the character itself, and its length."""
    for kind, run in groupby(text, key=_class):
        n = len(list(run))
        yield from [(kind, n)] if kind in _CLASSES else [(kind, 1)] * n


def _class(character: str) -> str:
    for name, pattern in _CLASSES.items():
        if re.fullmatch(pattern, character):
            return name
    return character


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.casefold().split())
