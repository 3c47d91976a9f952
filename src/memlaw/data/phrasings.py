"""Several ways to ask for one completion: some become records, the others are held out.

What is trained is recited, each phrasing by itself. Whether the model has learnt more than those
words (*generality*) shows in phrasings that it never saw: one in four, and at least one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from memlaw.core.errors import DataError
from memlaw.data.duplicates import contradiction, distinct, shortened
from memlaw.data.layouts import is_missing
from memlaw.data.messages import checked_chat, checked_text
from memlaw.data.readers import Reading, file_rows
from memlaw.data.record import Prompt, Record

_HELD_OUT = 4  # one in so many


def phrased(prompts: Sequence[Prompt], completion: str, where: str) -> list[Record]:
    """A record for each phrasing that is trained; the first of them carries those held out.

    Held out are the last of them, a quarter, rounded down, but one at least; of a single one, none.

    Args:
        prompts: all phrasings, at least one.
        completion: what they ask for.
        where: id of the first record; the others' say which phrasing they are.
    """
    kept = len(prompts) - (max(1, len(prompts) // _HELD_OUT) if len(prompts) > 1 else 0)
    ids = [where, *(f"{where}, phrasing {n}" for n in range(2, kept + 1))]
    found = [
        Record(prompt=prompt, completion=completion, id=id)
        for prompt, id in zip(prompts, ids, strict=False)
    ]
    return [replace(found[0], held_out=tuple(prompts[kept:])), *found[1:]]


def checked_phrasings(value: Any, field: str, where: str) -> list[Prompt]:
    """Phrasings as a row has them: a list of texts or of messages, each phrasing once.

    Raises:
        DataError: it is no such list, or holds none.
    """
    if not isinstance(value, list | tuple) or not value:
        kind = "missing or empty" if is_missing(value) or not value else f"a {type(value).__name__}"
        raise DataError(f"{where}: field '{field}' is {kind}. Give a list of prompts.")
    found: dict[str, Prompt] = {}
    for n, one in enumerate(value, 1):
        prompt: Prompt = (
            tuple(checked_chat(one, where))
            if isinstance(one, list)
            else checked_text(one, f"{field}[{n}]", where)
        )
        found.setdefault(repr(prompt), prompt)
    return list(found.values())


def with_paraphrases(
    records: Sequence[Record], path: str | Path, notice: Callable[[str], None] = lambda text: None
) -> list[Record]:
    """Records, and the further phrasings that a file has for some of them.

    Args:
        records: as they were read.
        path: rows with `prompt`, that of a record, and `paraphrases`, a list of others.
        notice: as for `distinct`.

    Raises:
        DataError: it can't be read, or a row is not so, or is about no record.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist. Check the path of the paraphrases.")
    others: dict[str, tuple[str, list[Prompt]]] = {}
    for key, (where, more) in _rows(path):
        others.setdefault(key, (where, []))[1].extend(more)
    found: list[Record] = []
    for record in records:
        if (its := others.pop(repr(record.prompt), None)) is None:
            found.append(record)
        else:
            prompts = {repr(p): p for p in (record.prompt, *its[1], *record.held_out)}
            found += phrased(list(prompts.values()), record.completion, record.id)
    if others:
        where, more_of = next(iter(others.values()))
        raise DataError(
            f"{where}: no record has this prompt, so its {len(more_of)} paraphrase(s) ask for "
            f"nothing. Write 'prompt' as the record has it ({len(others)} such row(s))."
        )
    return held_apart(distinct(found, notice))


def _rows(path: Path) -> Iterator[tuple[str, tuple[str, list[Prompt]]]]:
    for where, row in file_rows(path, Reading()):
        if isinstance(row, DataError):
            raise row
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: no object with 'prompt' and 'paraphrases'.")
        (prompt,) = checked_phrasings([row.get("prompt")], "prompt", where)
        yield repr(prompt), (where, checked_phrasings(row.get("paraphrases"), "paraphrases", where))


def held_apart(records: Sequence[Record]) -> list[Record]:
    """The records; what one of them is trained on isn't held out of another.

    Raises:
        DataError: a phrasing that is held out is the prompt of a record with another completion.
    """
    trained = {repr(record.prompt): record for record in records}
    conflicts, found = [], []
    for record in records:
        left = []
        for prompt in record.held_out:
            other = trained.get(repr(prompt))
            if other is None:
                left.append(prompt)
            elif other.completion != record.completion:
                conflicts.append(
                    f"  {other.id} and {record.id}: '{shortened(other.title)}' -> "
                    f"'{shortened(other.completion)}' or '{shortened(record.completion)}'"
                )
        found.append(replace(record, held_out=tuple(left)) if record.held_out else record)
    if conflicts:
        raise contradiction(conflicts)
    return found
