"""Read records from a file or from Python objects; refuse records that can't be recalled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from memlaw.core.errors import DataError
from memlaw.data.duplicates import distinct
from memlaw.data.messages import answer_of, checked_chat, checked_text
from memlaw.data.readers import RECITE_PROMPT, DataFormat, Row, file_rows
from memlaw.data.record import Record

# Fields of the memory probe's published data (arXiv 2605.30260), read without being named.
_PUBLISHED = (("query", "target"), ("question", "matching"))


def read_records(
    source: Any,
    *,
    prompt_field: str | None = None,
    completion_field: str | None = None,
    format: DataFormat = "auto",
    recite_prompt: str = RECITE_PROMPT,
    notice: Callable[[str], None] = lambda text: None,
) -> list[Record]:
    """Read records from a file or from Python objects, and refuse what can't be recalled.

    Args:
        source: a path (JSONL, JSON array, CSV, TSV, Parquet, or plain text, which is one long
            record), or an iterable of `Record`s, of mappings (so also a `datasets.Dataset`), or
            of `(prompt, completion)` pairs.
        prompt_field: name of the prompt's field. Default: `prompt`.
        completion_field: name of the completion's field. Default: `completion`. A row without
            both but with `messages` is a chat whose last message is the completion; the pairs
            `query` and `target`, `question` and `matching` are recognised, too.
        format: the file's format; `auto` decides by its suffix.
        recite_prompt: the prompt of a plain-text file.
        notice: called with one sentence if duplicates were merged.

    Returns:
        The records in their order, each (prompt, completion) once; at least one.

    Raises:
        DataError: no such file or no records in it, a file that can't be read, a field that is
            missing or not text, an empty prompt or completion, or one prompt with two different
            completions. Names file and line.
    """
    if isinstance(source, str | Path):
        rows = file_rows(Path(source), format, recite_prompt)
        name = str(source)
    else:
        rows, name = _object_rows(source), "the data"
    fields = (prompt_field, completion_field)
    records = [
        _checked(row) if isinstance(row, Record) else _to_record(row, where, fields)
        for where, row in rows
    ]
    if not records:
        raise DataError(f"{name} holds no records. Give at least one prompt and completion.")
    return distinct(records, notice)


def _object_rows(source: Any) -> Iterator[Row]:
    if not isinstance(source, Iterable) or isinstance(source, Mapping | bytes):
        raise DataError(
            f"records of type {type(source).__name__} are not understood. Give a path, or a list "
            "of dicts, of (prompt, completion) pairs or of Records, or a datasets.Dataset (one "
            "split of it: ds['train'])."
        )
    for n, row in enumerate(source, 1):
        if isinstance(row, tuple | list) and len(row) == 2:
            row = {"prompt": row[0], "completion": row[1]}
        yield f"record:{n}", row


def _checked(record: Record) -> Record:
    """A record that was given as such, checked like one that was read."""
    if isinstance(record.prompt, str):
        checked_text(record.prompt, "prompt", record.id)
        checked_text(record.completion, "completion", record.id)
        return record
    answer = {"role": "assistant", "content": record.completion}
    _from_messages([*record.prompt, answer], record.id)
    return record


def _to_record(row: Any, where: str, fields: tuple[str | None, str | None]) -> Record:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: {type(row).__name__} instead of an object with fields.")
    if fields == (None, None) and "messages" in row:
        return _from_messages(row["messages"], where, row)
    published = next((pair for pair in _PUBLISHED if set(pair) <= row.keys()), None)
    if fields == (None, None) and published and "prompt" not in row:
        fields = published
    names = (fields[0] or "prompt", fields[1] or "completion")
    for name, flag in zip(names, ("--prompt-field", "--completion-field"), strict=True):
        if name not in row:
            raise DataError(
                f"{where}: no field '{name}'; the fields are {', '.join(map(str, row)) or 'none'}."
                f" Rename the right one, or name it with {flag} (write, audit)."
            )
    prompt, completion = row[names[0]], row[names[1]]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _from_messages([*prompt, *completion], where, row)
    if isinstance(prompt, str) and isinstance(row.get("tools"), list) and row["tools"]:
        asked = {"role": "user", "content": prompt}
        said = {"role": "assistant", "content": completion}
        return _from_messages([asked, said], where, row)
    return Record(
        prompt=checked_text(prompt, names[0], where),
        completion=checked_text(completion, names[1], where),
        id=where,
    )


def _from_messages(messages: Any, where: str, row: Mapping[str, Any] | None = None) -> Record:
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{where}: 'messages' must be a list of at least two messages.")
    *prompt, answer = checked_chat(messages, where, row)
    return Record(prompt=tuple(prompt), completion=answer_of(answer, where), id=where)
