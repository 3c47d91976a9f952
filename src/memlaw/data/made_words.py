"""Words that look like given ones and are none of them: made up, names, misspellings."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Sequence

from memlaw.data.names import FIRST_NAMES, LAST_NAMES

_END = ""
_ORDERS = (2, 1, 0)  # how many letters decide the next one; less where that gives known words only
_TRIES = 10


class Words:
    """Makes words by a Markov chain of letters: it learns any script, digits included.

    Args:
        sample: the words to learn from.
        known: words, in lower case, that must not come out.
    """

    def __init__(self, sample: Sequence[str], known: Collection[str]) -> None:
        self.known = known
        self.known_but_a_letter = {part for word in known for part in _shortened(word)}
        self.next: dict[int, dict[str, list[str]]] = {n: defaultdict(list) for n in _ORDERS}
        for word in sample:
            for i, letter in enumerate([*word, _END]):
                for n in _ORDERS:
                    self.next[n][_context(word[:i], n)].append(letter)
        lengths = [len(word) for word in sample]
        self.shortest, self.longest = min(lengths, default=0), max(lengths, default=0)
        self.letters = sorted({letter for word in sample for letter in word})
        self.names = {
            last: [name for name in names if name.casefold() not in known]
            for last, names in ((False, FIRST_NAMES), (True, LAST_NAMES))
        }

    def made_up(self, draw: random.Random) -> str | None:
        """A word that looks like the sample's, if possible by two letters or more another.

        None where nothing new comes out.
        """
        close = None
        for order in _ORDERS if self.longest else ():
            for _ in range(_TRIES):
                word = ""
                while len(word) < self.longest + 1:
                    letter = draw.choice(self.next[order][_context(word, order)])
                    if letter == _END:
                        break
                    word += letter
                if len(word) < self.shortest or word.casefold() in self.known:
                    continue
                if self.known_but_a_letter.isdisjoint(_shortened(word.casefold())):
                    return word
                close = word
        return close

    def name(self, draw: random.Random, *, last: bool) -> str | None:
        """A first or last name; None where all are known."""
        return draw.choice(self.names[last]) if self.names[last] else None

    def misspelt(self, word: str, draw: random.Random) -> str:
        """The word with a letter missing, doubled, exchanged with the next, or another one."""
        i = draw.randrange(len(word))
        how = draw.randrange(4)
        if how == 0 and len(word) > 1:
            return word[:i] + word[i + 1 :]
        if how == 1:
            return word[: i + 1] + word[i:]
        if how == 2 and i + 1 < len(word):
            return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        return word[:i] + draw.choice(self.letters or [*word]) + word[i + 1 :]


def _context(before: str, order: int) -> str:
    """The letters that decide the next one; at the start of a word, fewer."""
    return before[-order:] if order else ""


def _shortened(word: str) -> set[str]:
    """The word, and the word without each of its letters: two that differ by one share one."""
    return {word, *(word[:i] + word[i + 1 :] for i in range(len(word)))}
