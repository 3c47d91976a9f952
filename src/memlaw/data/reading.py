"""Read records from a file or from Python objects; refuse records that can't be recalled."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memlaw.core.errors import DataError
from memlaw.data.bad_rows import BadRows
from memlaw.data.duplicates import distinct, shortened
from memlaw.data.layouts import LAYOUTS, Layout, is_filled, layout_of, left_out, pair
from memlaw.data.messages import answer_of, checked_chat, checked_text, given_by
from memlaw.data.objects import object_rows
from memlaw.data.phrasings import checked_phrasings, held_apart, phrased, with_paraphrases
from memlaw.data.readers import RECITE_PROMPT, DataFormat, Reading, Row, file_rows
from memlaw.data.record import ARGUMENTS, CALLS, Record, with_given


def read_records(
    source: Any,
    *,
    prompt_field: str | None = None,
    completion_field: str | None = None,
    format: DataFormat = "auto",
    delimiter: str | None = None,
    recite_prompt: str = RECITE_PROMPT,
    paraphrases: str | Path | None = None,
    bad: BadRows | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> list[Record]:
    """Read records from a file or from Python objects, and refuse what can't be recalled.

    Args:
        source: a path (JSONL, JSON, CSV, TSV, Parquet, Arrow, each also packed with gzip or zstd; a
            folder that `save_to_disk` of `datasets` wrote; or plain text, which is one long
            record), or an iterable of `Record`s, of mappings (so also a `datasets.Dataset`), or
            of `(prompt, completion)` pairs; or a data frame, an Arrow table, a NumPy array.
        prompt_field: name of the prompt's field in the data. Default: `prompt`.
        completion_field: name of the completion's field in the data. Default: `completion`. If
            neither is named, the fields tell the layout (`LAYOUTS`): `messages`, a chat whose last
            message is the completion; ShareGPT's `conversations`; Alpaca's `instruction`; …
        format: the file's format; `auto` decides by its suffix.
        delimiter: between the cells of a CSV file. Default: found out from its first line.
        recite_prompt: the prompt of a plain-text file, and of rows with `text` alone.
        paraphrases: a file with other phrasings of the records' prompts; see `with_paraphrases`.
        bad: takes the rows that can't be used, instead of refusing them here.
        notice: called with a sentence on what isn't usual: how fields were understood, filled
            fields that are left out, duplicates that were merged.

    Returns:
        The records in their order, each (prompt, completion) once; at least one.

    Raises:
        DataError: no such file or no records in it, a file that can't be read, or one prompt with
            two different completions. Without `bad` also rows with a field that is missing or not
            text, or with an empty prompt or completion: all in one message, with file and line.
        ConfigError: the delimiter isn't one character.
    """
    if isinstance(source, str | Path):
        name = str(source)
        rows = file_rows(
            Path(source),
            Reading(format=format, delimiter=delimiter, recite_prompt=recite_prompt, notice=notice),
        )
    else:
        rows, name = object_rows(source), "the data"
    named = None
    if (prompt_field, completion_field) != (None, None):
        named = pair(prompt_field or "prompt", completion_field or "completion")
    found = BadRows() if bad is None else bad
    records, understood = _records(rows, named, recite_prompt, found)
    if bad is None or not records:
        found.settle(len(records), skip=False, notice=notice)
    if not records:
        raise DataError(f"{name} holds no records. Give at least one prompt and completion.")
    for text in understood:
        notice(f"{Path(name).name}: {text}")
    found_once = held_apart(distinct(records, notice))
    return with_paraphrases(found_once, paraphrases, notice) if paraphrases else found_once


def _records(
    rows: Iterable[Row], named: Layout | None, recite_prompt: str, bad: BadRows
) -> tuple[list[Record], list[str]]:
    """The records of rows, and notices on what their fields were taken for."""
    records: list[Record] = []
    said: Counter[str] = Counter()
    unused: dict[str, list[str]] = {}  # the ids of rows with a field that is filled and left out
    texts: dict[str, str] = {}  # without a prompt of their own, and the first row with each
    for where, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            if isinstance(row, Record):
                records.append(_checked(row))
                continue
            if _are_messages(row):
                row = {"messages": row}
                said["each row is a list of messages"] += 1
            if not isinstance(row, Mapping):
                raise DataError(f"{type(row).__name__} instead of an object with fields.")
            layout = named or layout_of(row) or _USUAL
            records += _to_records(row, where, layout, recite_prompt)
        except DataError as error:
            bad.add(row.id if isinstance(row, Record) else where, error)
            continue
        said[layout.said] += 1
        if layout.fields == ("text",):
            texts.setdefault(records[-1].completion, where)
        for name in left_out(row, layout):
            unused.setdefault(name, []).append(where)
    if len(texts) > 1:
        first, second, *_ = texts.values()
        raise DataError(
            f"{len(texts)} rows hold 'text' and no prompt: {first}, {second}, … One prompt, "
            f"'{shortened(recite_prompt)}', can't be followed by all of them. Give each row a "
            "'prompt', and its text as 'completion'."
        )
    notices = [f"{text} ({n} row(s))." for text, n in said.items() if text]
    notices += [
        f"the field '{name}' is filled in {len(ids)} row(s) (the first: {ids[0]}), but is part of "
        "neither prompt nor completion."
        for name, ids in unused.items()
    ]
    return records, notices + _told_answers(records)


def _told_answers(records: Sequence[Record]) -> list[str]:
    """What to say of answers that stand in prompts: they are read, and not recited."""
    said = {
        r.id: [m.get("role") == "assistant" and not any(m.get(c) for c in CALLS) for m in r.prompt]
        for r in records
        if not isinstance(r.prompt, str)
    }
    several = [id for id, answers in said.items() if any(answers)]
    ahead = [id for id, answers in said.items() if answers[-1]]
    notices = []
    if several:
        notices.append(
            f"{len(several)} conversation(s) have several answers (the first: {several[0]}). The "
            "last of each is the completion; the others are part of its prompt. To have all of "
            "them recited, give a row for each, with the messages up to it."
        )
    if ahead:
        notices.append(
            f"{len(ahead)} prompt(s) end in a message of the assistant's (the first: {ahead[0]}). "
            "The completion is taken for a message of its own, not for the rest of that one."
        )
    return notices


_SHOWN = 20
_USUAL = pair("prompt", "completion")


def _checked(record: Record) -> Record:
    """A record that was given as such, checked like one that was read."""
    if isinstance(record.prompt, str):
        checked_text(record.prompt, "prompt", record.id)
        checked_text(record.completion, "completion", record.id)
        return record
    answer = {"role": "assistant", "content": record.completion}
    _from_messages([*record.prompt, answer], record.id)
    return record


def _some(row: Mapping[str, Any]) -> str:
    """The names of a row's fields, the first of them if there are many."""
    names = [shortened(str(name)) for name in itertools.islice(row, _SHOWN)]
    more = f" and {len(row) - _SHOWN:,} more" if len(row) > _SHOWN else ""
    return f"{', '.join(names)}{more}" if names else "none"


def _to_records(
    row: Mapping[str, Any], where: str, layout: Layout, recite_prompt: str
) -> list[Record]:
    """One record, or of several prompts one each."""
    flags = ("--prompt-field", "--completion-field")
    for name, flag in zip(layout.fields, flags, strict=False):
        if name not in row:
            raise DataError(
                f"{where}: no field '{name}'; the fields are {_some(row)}."
                f" Rename the right one, or name it with {flag} (write, audit)."
            )
    if row.get("label") is False and any(layout is known for known in LAYOUTS):
        raise DataError(
            f"{where}: 'label' is false, which marks an answer that isn't wanted (as in data for "
            "KTO). Leave the row out; or name the fields to be taken with --prompt-field and "
            "--completion-field, and the label isn't looked at."
        )
    taken = layout.take(row)
    if "messages" in taken:
        return [_from_messages(taken["messages"], where, row)]
    completion = taken["completion"]
    given = any(is_filled(row.get(name)) for name in ("tools", ARGUMENTS))
    if "prompts" in taken:
        prompts = checked_phrasings(taken["prompts"], "prompts", where)
        if given:
            prompts = [with_given(prompt, given_by(row, where)) for prompt in prompts]
        return phrased(prompts, checked_text(completion, "completion", where), where)
    prompt = taken.get("prompt", recite_prompt)
    if given or any(_are_messages(part) for part in (prompt, completion)):
        asked, said = (
            part if isinstance(part, list) else [{"role": role, "content": part}]
            for role, part in (("user", prompt), ("assistant", completion))
        )
        return [_from_messages([*asked, *said], where, row)]
    return [
        Record(
            prompt=checked_text(prompt, layout.fields[0], where),
            completion=checked_text(completion, layout.fields[-1], where),
            id=where,
        )
    ]


def _are_messages(value: Any) -> bool:
    """A list of messages, not of texts."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in value)
    )


def _from_messages(messages: Any, where: str, row: Mapping[str, Any] | None = None) -> Record:
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{where}: 'messages' must be a list of at least two messages.")
    *prompt, answer = checked_chat(messages, where, row)
    return Record(prompt=tuple(prompt), completion=answer_of(answer, where), id=where)
