"""Tables in text: CSV with any delimiter, as spreadsheets write it, and TSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from memlaw.core.errors import ConfigError, DataError
from memlaw.data.content import text_of

_DELIMITERS = (",", ";", "\t", "|")  # those that are found out by themselves
_SEP_LINE = re.compile(r'"?sep=([^"\r\n])"?[ \t;,]*(?:\r\n|\r|\n)', re.IGNORECASE)  # Excel's


def csv_rows(
    path: Path, delimiter: str | None, notice: Callable[[str], None]
) -> Iterator[tuple[str, Any]]:
    """Rows of a CSV file: RFC 4180, but with any delimiter.

    Args:
        path: the file.
        delimiter: one character, or `tab` or `\\t`; None: the one of a line `sep=X`, else the one
            of comma, semicolon, tab and bar that splits the header into most cells.
        notice: called if the delimiter was found out and is no comma.

    Raises:
        ConfigError: the delimiter isn't one character.
        DataError: the quotes don't fit, or the header has a name twice.
    """
    text, skipped = text_of(path), 0
    if found := _SEP_LINE.match(text):
        text, skipped = text[found.end() :], 1
    if delimiter is None:
        delimiter = found[1] if found else max(_DELIMITERS, key=lambda d: _n_columns(text, d))
        if delimiter != ",":
            notice(f"{path.name}: the cells are delimited by {delimiter!r}.")
    delimiter = {"tab": "\t", r"\t": "\t"}.get(delimiter, delimiter)
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise ConfigError(
            f"delimiter {delimiter!r} isn't one character. Give the one between the cells, or tab."
        )
    mend = f"Quote cells that hold a '{delimiter}' or a line break, or name the --delimiter."
    lines = list(_cells(path, text, delimiter, quoted=True, skipped=skipped))
    yield from _rows(path, lines, mend)


def tsv_rows(path: Path, notice: Callable[[str], None]) -> Iterator[tuple[str, Any]]:
    """Rows of a TSV file, which has no quoting: quotation marks are part of the text.

    Args:
        path: the file.
        notice: called if cells begin with a quotation mark.

    Raises:
        DataError: the header has a name twice.
    """
    lines = list(_cells(path, text_of(path), "\t", quoted=False, skipped=0))
    if quoted := [line for line, cells in lines if any(c.startswith('"') for c in cells)]:
        notice(
            f"{path.name}: {len(quoted)} line(s) have cells that begin with a quotation mark (the "
            f"first is line {quoted[0]}). TSV has no quoting, so the marks are part of the text. "
            "If they are only quoting, say --data-format csv."
        )
    mend = "In TSV no cell can hold a tab or a line break: use CSV (--data-format csv) or JSONL."
    yield from _rows(path, lines, mend)


def _n_columns(text: str, delimiter: str) -> int:
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        return len(next((cells for cells in lines if any(map(str.strip, cells))), []))
    except csv.Error:
        return 0


def _cells(
    path: Path, text: str, delimiter: str, *, quoted: bool, skipped: int
) -> Iterator[tuple[int, list[str]]]:
    """The lines that aren't blank, each with its number."""
    limit = csv.field_size_limit(len(text) + 1)  # else 131,072 characters
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        strict=True,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )
    try:
        line = skipped + 1  # the one that the next row begins on
        for cells in reader:
            if any(map(str.strip, cells)):
                yield line, cells
            line = skipped + reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{skipped + reader.line_num}: not CSV ({error}). Check the quotes."
        ) from error
    finally:
        csv.field_size_limit(limit)


def _rows(path: Path, lines: list[tuple[int, list[str]]], mend: str) -> Iterator[tuple[str, Any]]:
    if not lines:
        return
    (first, header), *rest = lines
    names = [name.strip() for name in header]
    named = list(filter(None, names))
    if len(set(named)) < len(named):
        raise DataError(f"{path}:{first}: two columns of one name. Rename one.")
    # Columns before the first name, such as a data frame's index, are no part of a record.
    begin = next(i for i, name in enumerate(names) if name)
    for line, cells in rest:
        where = f"{path.name}:{line}"
        fields = dict(zip(names, cells, strict=False))
        if len(cells) < len(names) and any(names[len(cells) :]):
            yield where, DataError(f"{where}: fewer cells than the header has. {mend}")
        elif any(cells[len(names) :]) or any(
            cell.strip()
            for name, cell in zip(names[begin:], cells[begin:], strict=False)
            if not name
        ):
            yield where, DataError(f"{where}: more cells than the header has. {mend}")
        else:
            yield where, {name: fields[name] for name in named}
