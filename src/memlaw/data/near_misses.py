"""Near misses: prompts that look like the records' but ask for nothing that is stored.

Made from the records' prompts alone, so that they work for any language and any kind of record: a
person's name, a question, a number. `recombined` and `unknown` name something that isn't stored.
The other kinds are a record's prompt written wrongly: a person may mean the record.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memlaw.data.made_words import Words
from memlaw.data.record import Message, Prompt, text_of, texts_of

KINDS: Mapping[str, float] = {
    "recombined": 0.4,
    "unknown": 0.4,
    "dropped": 0.05,
    "swapped": 0.05,
    "misspelt": 0.05,
    "case": 0.05,
}
NOT_STORED = ("recombined", "unknown")  # kinds that name something that isn't stored
_TRIES = 30  # for each near miss; where prompts are few, there are not as many
_SHORT = 3  # words; all of them tell one short prompt from another


@dataclass(frozen=True, kw_only=True)
class NearMiss:
    """A prompt like the records'.

    Attributes:
        prompt: as records have it: a string, or chat messages of which the last of the user's is
            changed.
        kind: recombined: words of one record, the rest of another. unknown: words that no record
            has. dropped, swapped: a word is missing, two neighbours have changed places. misspelt:
            a letter is missing, doubled, another, or has changed places. case: upper for lower case
            or the other way.
    """

    prompt: Prompt
    kind: str


def near_misses(
    prompts: Sequence[Prompt],
    n: int,
    *,
    seed: int,
    avoid: Collection[Prompt] = (),
    kinds: Mapping[str, float] = KINDS,
) -> list[NearMiss]:
    """Prompts like the records', none of which is one of them.

    None is a record's prompt or in `avoid`, upper and lower case and white space aside (a near miss
    of the kind `case` differs from them as a string), and none is there twice.

    Args:
        prompts: of the records, at least one, in any order.
        n: how many to make, ≥ 0.
        seed: random seed; the same prompts, n and seed give the same near misses.
        avoid: other prompts that must not be among them.
        kinds: the share of each kind. What can't be made of one kind is made of the others.

    Returns:
        At most n: of few or short prompts there are not as many. Kind after kind.
    """
    texts = sorted({_Text.of(prompt) for prompt in prompts}, key=lambda text: text.order)
    source = _Source(texts)
    taken = {_key(prompt) for prompt in (*prompts, *avoid)}
    exact = {_exact(prompt) for prompt in (*prompts, *avoid)}
    total = sum(kinds.values())
    streams = {
        kind: _new(source.stream(kind, random.Random(f"{seed} {kind}")), kind, taken, exact, n)
        for kind in kinds
    }
    made: dict[str, list[NearMiss]] = {kind: [] for kind in kinds}
    for due in (lambda kind: round(n * kinds[kind] / total), lambda kind: n):
        for kind, stream in streams.items():
            left = min(due(kind) - len(made[kind]), n - sum(map(len, made.values())))
            made[kind] += [found for _, found in zip(range(left), stream, strict=False)]
    return [found for each in made.values() for found in each]


def _new(
    candidates: Iterator[Prompt], kind: str, taken: set[str], exact: set[str], n: int
) -> Iterator[NearMiss]:
    """The candidates that are neither taken nor a record's, while there is hope for more."""
    hope = _TRIES * n
    for prompt in candidates:
        hope -= 1
        same = _exact(prompt) in exact if kind == "case" else _key(prompt) in taken
        if not same and _key(prompt):
            taken.add(_key(prompt))
            exact.add(_exact(prompt))
            yield NearMiss(prompt=prompt, kind=kind)
        if hope <= 0:
            return


def _exact(prompt: Prompt) -> str:
    return json.dumps(prompt if isinstance(prompt, str) else [dict(m) for m in prompt])


def _key(prompt: Prompt) -> str:
    """The same for prompts that differ in case, white space or Unicode form alone."""
    return "\n".join(
        " ".join(unicodedata.normalize("NFKC", text).split()).casefold()
        for text in texts_of(prompt)
    ).strip()


# ---------------------------------------------------------------- a prompt as words


@dataclass(frozen=True)
class _Text:
    """A prompt, cut at its words: `gaps[0] words[0] gaps[1] words[1] … gaps[-1]`."""

    before: tuple[tuple[tuple[str, Any], ...], ...] | None  # chat messages; None: a string
    changed: int  # which of them is changed
    words: tuple[str, ...]
    gaps: tuple[str, ...]
    chat: tuple[Message, ...] = field(default=(), compare=False)  # the messages as they were given

    @classmethod
    def of(cls, prompt: Prompt) -> _Text:
        if isinstance(prompt, str):
            return cls(None, 0, *_cut(prompt))
        users = [i for i, m in enumerate(prompt) if m.get("role") == "user"] or [len(prompt) - 1]
        messages = tuple(tuple((k, _hashable(v)) for k, v in m.items()) for m in prompt)
        return cls(messages, users[-1], *_cut(text_of(prompt[users[-1]])), prompt)

    @property
    def order(self) -> str:
        return repr((self.before, self.words, self.gaps))

    def with_words(self, words: Sequence[str]) -> Prompt:
        return self._with(
            "".join(a + b for a, b in zip(self.gaps, words, strict=False)) + self.gaps[-1]
        )

    def without(self, i: int) -> Prompt:
        """The prompt without its word i and the white space before it."""
        gap = self.gaps[i].rstrip() + (self.gaps[i + 1] if i else self.gaps[i + 1].lstrip())
        gaps = (*self.gaps[:i], gap, *self.gaps[i + 2 :])
        words = (*self.words[:i], *self.words[i + 1 :])
        return _Text(self.before, self.changed, words, gaps, self.chat).with_words(words)

    def _with(self, text: str) -> Prompt:
        if self.before is None:
            return text
        messages = [dict(m) for m in self.chat]
        changed = messages[self.changed]
        in_parts = isinstance(changed.get("content"), list)
        changed["content"] = [{"type": "text", "text": text}] if in_parts else text
        return tuple(messages)


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _cut(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words, without the punctuation around them, and what stands between them."""
    words, gaps, at = [], [], 0
    for piece in re.finditer(r"\S+", text):
        start, end = piece.span()
        core = piece.group().strip(_PUNCTUATION)
        if core:
            start += piece.group().index(core)
            end = start + len(core)
        words.append(text[start:end])
        gaps.append(text[at:start])
        at = end
    return tuple(words), (*gaps, text[at:])


_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~¡¿«»“”‘’„…–—、。，：；！？（）「」『』"


# ---------------------------------------------------------------- what is made of them


class _Source:
    """Makes candidates of each kind from the records' prompts."""

    def __init__(self, texts: Sequence[_Text]) -> None:
        self.texts = texts
        counts = Counter(w for text in texts for w in {word.casefold() for word in text.words})
        self.telling = {text: _telling(text, counts, len(texts)) for text in texts}
        self.words = Words(
            [text.words[i] for text in texts for i in self.telling[text]], known=counts
        )
        self.alike: dict[tuple[object, ...], list[_Text]] = defaultdict(list)
        for text in texts:
            self.alike[self._frame(text)].append(text)

    def _frame(self, text: _Text) -> tuple[object, ...]:
        """The same for prompts that differ in their telling words alone."""
        own = self.telling[text]
        fixed = tuple(w for i, w in enumerate(text.words) if i not in own)
        return (text.before and text.before[: text.changed], fixed, text.gaps, tuple(own))

    def stream(self, kind: str, draw: random.Random) -> Iterator[Prompt]:
        """Candidates of a kind, without end or none at all."""
        make: Callable[[_Text, random.Random, int], Prompt | None] = getattr(self, f"_{kind}")
        fruitless = 0
        i = 0
        while fruitless < _TRIES * len(self.texts):
            candidate = make(draw.choice(self.texts), draw, i)
            i += 1
            if candidate is None:
                fruitless += 1
            else:
                fruitless = 0
                yield candidate

    def _recombined(self, text: _Text, draw: random.Random, _: int) -> Prompt | None:
        own, words = self.telling[text], list(text.words)
        alike = self.alike[self._frame(text)]
        other = draw.choice(alike if len(alike) > 1 else self.texts)
        others = self.telling[other]
        if other == text or not own or not others:
            return None
        if len(alike) > 1 and len(own) > 1:
            for i in own[draw.randrange(1, len(own)) :]:
                words[i] = other.words[i]
        elif len(own) > 1 or (len(text.words) > 1 and len(alike) == 1):
            words[own[-1]] = other.words[others[-1]]
        else:  # one word tells them apart
            head, tail = words[own[0]], other.words[others[-1]]
            words[own[0]] = head[: (len(head) + 1) // 2] + tail[(len(tail) + 1) // 2 :]
        return text.with_words(words)

    def _unknown(self, text: _Text, draw: random.Random, i: int) -> Prompt | None:
        own, words = self.telling[text], list(text.words)
        names = i % 2 == 0 and all(_is_name(words[place]) for place in own)
        for place in own:
            word = (
                self.words.name(draw, last=place == own[-1]) if names else self.words.made_up(draw)
            )
            if word is None:
                return None
            words[place] = word
        return text.with_words(words) if own else None

    def _dropped(self, text: _Text, draw: random.Random, _: int) -> Prompt | None:
        return text.without(draw.randrange(len(text.words))) if len(text.words) > 1 else None

    def _swapped(self, text: _Text, draw: random.Random, _: int) -> Prompt | None:
        if len(text.words) < 2:
            return None
        i, words = draw.randrange(len(text.words) - 1), list(text.words)
        words[i], words[i + 1] = words[i + 1], words[i]
        return text.with_words(words)

    def _misspelt(self, text: _Text, draw: random.Random, _: int) -> Prompt | None:
        if not text.words:
            return None
        i, words = draw.randrange(len(text.words)), list(text.words)
        words[i] = self.words.misspelt(words[i], draw)
        return text.with_words(words)

    def _case(self, text: _Text, draw: random.Random, _: int) -> Prompt | None:
        change = draw.choice((str.lower, str.upper, str.title, str.swapcase))
        return text.with_words([change(word) for word in text.words])


def _telling(text: _Text, counts: Mapping[str, int], n: int) -> tuple[int, ...]:
    """Places of the words that tell this prompt from the others.

    Those that not every prompt has; in a longer prompt, the rarer half of them: the others are
    likely to be grammar.
    """
    rarity = {i: counts[word.casefold()] for i, word in enumerate(text.words)}
    varying = [i for i in rarity if n == 1 or rarity[i] < n] or list(rarity)
    if len(varying) > _SHORT:
        middle = sorted(rarity[i] for i in varying)[(len(varying) - 1) // 2]
        varying = [i for i in varying if rarity[i] <= middle]
    return tuple(varying)


def _is_name(word: str) -> bool:
    return word[:1].isupper() and word[1:2].islower() and not any(c.isdigit() for c in word)


def words_of(prompts: Iterable[Prompt]) -> set[str]:
    """All words of some prompts, in lower case, without the punctuation around them."""
    return {word.casefold() for prompt in prompts for word in _Text.of(prompt).words}
