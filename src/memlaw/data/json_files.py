"""JSON as people have it: an array, an object around one, or values one after another."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from memlaw.core.errors import DataError
from memlaw.data.content import text_of
from memlaw.data.layouts import layout_of

_BLANKS = " \t\r\n"
_VALUE = re.compile(r"[^ \t\r\n]")  # the begin of one
_ERRORS = (ValueError, RecursionError)  # what parsing raises
_MARK = "\ufeff"  # byte-order marks stand within files that were put together from several


def json_rows(
    path: Path, notice: Callable[[str], None], *, lines: bool
) -> Iterator[tuple[str, Any]]:
    """The records of a JSON file: of an array, of the one list in an object, or one by one.

    Args:
        path: the file.
        notice: called with the name of the list that was taken, if it was in an object.
        lines: each line should hold one record, so that a line that isn't JSON is a bad row.

    Raises:
        DataError: the file isn't JSON, or an object holds several lists of records or columns.
            A line that isn't JSON is a row whose value is the error.
    """
    text = text_of(path)
    begin = text.lstrip(_BLANKS)
    try:
        whole = _parsed(text)
    except _ERRORS as error:
        several = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        if several and not _is_json(begin.partition("\n")[0]):
            yield from _value_rows(path, text)
        elif several or (lines and not begin.startswith("[")):
            yield from _line_rows(path, text)
        else:
            raise _no_json(error, path, 1) from error
        return
    if isinstance(whole, list):
        yield from ((f"{path.name}:{n}", row) for n, row in enumerate(whole, 1))
    elif lines and "\n" not in begin.rstrip(_BLANKS):
        yield from _line_rows(path, text)
    else:
        rows = _records_in(whole, path, notice)
        yield from ((f"{path.name}:{n}", row) for n, row in enumerate(rows, 1))


def is_json_rows(line: str) -> bool:
    """A line begins an array of records, or holds one."""
    return line == "[" or (line[:1] in ("{", "[") and _is_json(line.rstrip(",")))


def _records_in(whole: Any, path: Path, notice: Callable[[str], None]) -> list[Any]:
    """The records of one JSON value: itself, or the list in it."""
    if not isinstance(whole, Mapping):
        return [whole]
    if {"columns", "data"} <= set(whole):
        raise DataError(
            f"{path}: columns and data apart from each other, as pandas writes with "
            "orient='split'. Save the records as a list (to_json(path, orient='records'))."
        )
    lists = {name: rows for name, rows in whole.items() if _is_list_of(rows, Mapping)}
    if whole and all(isinstance(v, Mapping) or _is_list_of(v, str) for v in whole.values()):
        raise DataError(
            f"{path}: not rows but columns or splits ({', '.join(list(whole)[:5])}). Save the "
            "records as a list (pandas: to_json(path, orient='records'))."
        )
    if not lists or layout_of(whole) is not None:
        return [whole]
    if len(lists) > 1:
        raise DataError(
            f"{path}: an object with several lists of records ({', '.join(lists)}). Save one of "
            "them as a file of its own."
        )
    ((name, rows),) = lists.items()
    notice(f"{path.name}: the records are taken from the list '{name}'.")
    return rows


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, kind) for v in value)


def _line_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path.name}:{n}"
            try:
                yield where, _parsed(line.lstrip(_MARK))
            except _ERRORS as error:
                yield where, _no_json(error, Path(path.name), n)


def _value_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Values one after another, of any number of lines each."""
    decoder, at, n = json.JSONDecoder(object_pairs_hook=_each_once), 0, 0
    while found := _VALUE.search(text, at):
        if n and text[found.start()] == ",":
            raise DataError(
                f"{path}: a comma stands behind record {n}. Give a record a line without commas "
                "between them, or put all of them in [ ]."
            )
        n += 1
        try:
            value, at = decoder.raw_decode(text, found.start())
        except _ERRORS as error:
            raise _no_json(error, path, 1) from error
        yield f"{path.name}:{n}", value


def _is_json(text: str) -> bool:
    try:
        _parsed(text)
    except _ERRORS:
        return False
    return True


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_each_once)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a name that it has twice, Python's parser would keep the last in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return found


class _Twice(ValueError):
    """A name that an object has twice."""


def _no_json(error: Exception, path: Path, line: int) -> DataError:
    """Says where the JSON is broken; `line` is the one that was parsed, or the first."""
    if isinstance(error, json.JSONDecodeError):
        line = line if error.lineno == 1 else error.lineno
        return DataError(
            f"{path}:{line}: not JSON ({error.msg}, column {error.colno}). Correct or remove it."
        )
    if isinstance(error, _Twice):
        return DataError(f"{path}:{line}: the field '{error}' stands there twice. Remove one.")
    if isinstance(error, RecursionError):
        return DataError(f"{path}:{line}: JSON nested too deeply. Correct or remove it.")
    # a number of thousands of digits
    return DataError(f"{path}:{line}: not readable ({error}). Put long numbers in quotes.")
