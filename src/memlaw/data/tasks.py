"""The probe's tasks: synthetic data of any size, or the user's own.

Smaller data are prefixes of larger ones, and the tokens that a low ratio of noise replaces are a
subset of those that a higher ratio replaces. So two cells of a grid differ only in the setting that
differs.

Source of phonebook and noise: arXiv 2605.30260.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memlaw.core.errors import ConfigError, DataError
from memlaw.data.encoding import encode, encode_prompt, end_of_turn_id, special_ids
from memlaw.data.readers import RECITE_PROMPT
from memlaw.data.reading import read_records
from memlaw.data.record import Example, Record
from memlaw.data.texts import natural_prose

Kind = Literal["phonebook", "noise", "text", "records"]
_DIGITS = 10
_MAX_RECORDS = 500_000  # of so many first and last names


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a cell's adapter has to remember.

    Attributes:
        kind: phonebook (made-up names with random digits), noise (a natural text with a share of
            its tokens replaced by random ones), text (the beginning of a file), or records (the
            first records of a file).
        ratio: for noise: the share of tokens that is replaced, in [0, 1].
        path: for text and records: the file.
    """

    kind: Kind
    ratio: float | None = None
    path: Path | None = None

    @property
    def name(self) -> str:
        """As on the command line, without the folder of a file."""
        if self.kind == "noise":
            return f"noise:{self.ratio:g}"
        return self.kind if self.path is None else f"{self.kind}:{self.path.name}"


def parse_task(text: str) -> Task:
    """Parse `phonebook`, `noise` (ratio 1), `noise:RATIO`, `text:FILE` or `records:FILE`.

    Raises:
        ConfigError: it is none of these, or the ratio isn't in [0, 1].
    """
    kind, _, rest = text.partition(":")
    if kind == "phonebook" and not rest:
        return Task(kind="phonebook")
    if kind == "noise":
        try:
            ratio = float(rest or "1")
        except ValueError:
            ratio = -1.0
        if not 0 <= ratio <= 1:
            raise ConfigError(f"task '{text}': the share of noise is a number from 0 to 1.")
        return Task(kind="noise", ratio=ratio)
    if kind in ("text", "records") and rest:
        return Task(kind=kind, path=Path(rest))  # type: ignore[arg-type]
    raise ConfigError(
        f"no task '{text}'. There are phonebook, noise, noise:RATIO, text:FILE and records:FILE."
    )


def task_examples(
    task: Task,
    tokenizer: Any,
    n_tokens: int,
    seed: int,
    *,
    format: Literal["chat", "plain"],
    natural_text: str | Path | None = None,
    max_tokens: int | None = None,
) -> list[Example]:
    """The examples of one task, at one size and seed.

    Args:
        task: which task.
        tokenizer: the model's.
        n_tokens: number of target tokens in all, end-of-turn tokens included; at least 1. Whole
            records are taken as long as they fit, at least one of them, so that the number may be
            missed.
        seed: decides names, digits and noise.
        format: see `encode_prompt`.
        natural_text: for noise: the file whose tokens are replaced (default: prose from the
            docstrings of Python's standard library).
        max_tokens: the model's context length; None if it has no limit.

    Returns:
        Examples whose record ids begin with the seed.

    Raises:
        DataError: a file can't be read or is too short, or a record is longer than the model's
            context.
    """
    if task.kind == "phonebook":
        return _fitting(
            lambda part: encode(part, tokenizer, format=format, max_tokens=max_tokens),
            phone_book(seed),
            n_tokens,
        )
    if task.kind == "records":
        records = read_records(task.path)
        n_records = len(records)
        examples = _fitting(
            lambda part: encode(part, tokenizer, format=format, max_tokens=max_tokens),
            (_renamed(record, seed) for record in records),
            n_tokens,
        )
        if len(examples) == n_records and sum(len(e.target_ids) for e in examples) < n_tokens // 2:
            raise DataError(
                f"{task.path} holds {sum(len(e.target_ids) for e in examples)} target tokens, "
                f"{n_tokens} are asked for. Give more records, or smaller lengths."
            )
        return examples
    source = task.path if task.kind == "text" else natural_text
    ids = _text_tokens(tokenizer, source, n_tokens - 1, None if task.kind == "text" else seed)
    if special_ids(tokenizer) & set(ids):
        raise DataError(
            f"{source}: holds special tokens of the tokenizer, at which decoding would stop or "
            "derail. Remove or rewrite them."
        )
    ids = _noisy(ids, tokenizer, task.ratio or 0.0, seed)
    prompt_ids = encode_prompt(tokenizer, RECITE_PROMPT, format)
    if max_tokens is not None and len(prompt_ids) + n_tokens > max_tokens:
        raise DataError(
            f"{len(prompt_ids) + n_tokens} tokens, but the model's context is {max_tokens}. "
            "Probe smaller lengths."
        )
    record = Record(
        prompt=RECITE_PROMPT, completion=tokenizer.decode(ids), id=f"{seed}:{task.name}"
    )
    end = end_of_turn_id(tokenizer, format)
    return [Example(record=record, prompt_ids=prompt_ids, target_ids=(*ids, end))]


def phone_book(seed: int) -> Iterator[Record]:
    """Made-up people with random phone numbers of ten digits: up to 500,000, no name twice.

    Raises:
        DataError: more were asked for.
    """
    from faker.providers.person.en_US import Provider

    first, last = sorted(Provider.first_names), sorted(Provider.last_names)
    draw = random.Random(f"phonebook {seed}").random  # of the module, what is sure to stay as it is
    taken: set[str] = set()
    while len(taken) < _MAX_RECORDS:
        name = f"{first[int(draw() * len(first))]} {last[int(draw() * len(last))]}:"
        number = "".join(str(int(draw() * 10)) for _ in range(_DIGITS))
        if name not in taken:
            taken.add(name)
            yield Record(prompt=name, completion=number, id=f"{seed}:{len(taken)}")
    raise DataError(f"the phone book has {_MAX_RECORDS:,} names at most. Probe smaller lengths.")


def _renamed(record: Record, seed: int) -> Record:
    return Record(prompt=record.prompt, completion=record.completion, id=f"{seed}:{record.id}")


def _fitting(
    encoded: Callable[[list[Record]], list[Example]], records: Iterable[Record], n_tokens: int
) -> list[Example]:
    """The first records whose targets together fit into `n_tokens`; at least one."""
    taken: list[Record] = []
    n_left = n_tokens
    for record in records:
        n_left -= len(encoded([record])[0].target_ids)
        if taken and n_left < 0:
            break
        taken.append(record)
    return encoded(taken)


def _text_tokens(
    tokenizer: Any, path: str | Path | None, n_tokens: int, seed: int | None
) -> list[int]:
    """`n_tokens` of a text: from its beginning, or from a random place on, wrapping around."""
    ids = _tokenized(tokenizer, path)
    if len(ids) < n_tokens:
        raise DataError(
            f"{path or 'the built-in text'} has {len(ids):,} tokens, {n_tokens:,} are asked for. "
            "Give a longer text, or smaller lengths."
        )
    start = 0 if seed is None else int(random.Random(f"text {seed}").random() * len(ids))
    return (ids[start:] + ids[:start])[:n_tokens]


@functools.lru_cache(maxsize=4)
def _tokenized(tokenizer: Any, path: str | Path | None) -> list[int]:
    try:
        text = natural_prose() if path is None else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as UTF-8 text ({error}).") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _noisy(ids: list[int], tokenizer: Any, ratio: float, seed: int) -> list[int]:
    """Replace each token, with probability `ratio`, by one drawn uniformly from the vocabulary."""
    special = special_ids(tokenizer)
    vocabulary = [token for token in range(len(tokenizer)) if token not in special]
    draw = random.Random(f"noise {seed}").random
    noisy = []
    for token in ids:
        is_replaced, rival = draw() < ratio, vocabulary[int(draw() * len(vocabulary))]
        noisy.append(rival if is_replaced else token)
    return noisy
