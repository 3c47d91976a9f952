"""The file formats of records: a reader for each of them, and the table that lists the readers.

To add a format, write its reader, and add it to `DataFormat` and to `READERS`. What messages say
about formats is derived from the table.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memlaw.core.errors import DataError
from memlaw.data.record import Record

DataFormat = Literal["auto", "jsonl", "json", "csv", "tsv", "parquet", "text"]
Row = tuple[str, Any]  # where it comes from, as `file:line`; and a mapping of fields, or a Record

RECITE_PROMPT = "Recite the text."


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One file format.

    Attributes:
        name: the format's name in messages and documentation.
        suffixes: suffixes of such files, in lower case, with the dot.
        rows: yields the rows of a file; its second argument is the prompt to use in formats that
            hold no prompts.
    """

    name: str
    suffixes: tuple[str, ...]
    rows: Callable[[Path, str], Iterator[Row]]


def file_rows(path: Path, format: DataFormat, recite_prompt: str) -> Iterator[Row]:
    """Read the rows of a file.

    Args:
        path: the file.
        format: its format; `auto` decides by its suffix.
        recite_prompt: the prompt of a plain-text file.

    Raises:
        DataError: no such file, an unknown suffix or format, or content that isn't in this format.
            Names file and line.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder. Name one file of records.")
    if not path.exists():
        raise DataError(f"{path} does not exist. Check the path of the records.")
    yield from _reader(path, format).rows(path, recite_prompt)


def _reader(path: Path, format: DataFormat) -> Reader:
    if format in READERS:
        return READERS[format]
    if format != "auto":
        raise DataError(f"no data format '{format}'. There are auto, {', '.join(READERS)}.")
    by_suffix = {suffix: reader for reader in READERS.values() for suffix in reader.suffixes}
    if path.suffix.lower() not in by_suffix:
        raise DataError(
            f"{path}: can't tell its format from the suffix '{path.suffix}'. Use one of "
            f"{', '.join(by_suffix)}, or say --data-format {'|'.join(READERS)} (write, audit)."
        )
    return by_suffix[path.suffix.lower()]


def _jsonl_rows(path: Path, _: str) -> Iterator[Row]:
    for n, line in enumerate(text_of(path).split("\n"), 1):
        if line.strip():
            yield f"{path.name}:{n}", _parse_json(line, f"{path}:{n}")


def _json_rows(path: Path, _: str) -> Iterator[Row]:
    rows = _parse_json(text_of(path), str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path}: not a JSON array. Wrap the records in [ ], or use JSONL.")
    yield from _numbered(path, rows)


def _csv_rows(path: Path, _: str) -> Iterator[Row]:
    return _delimited_rows(path, ",")


def _tsv_rows(path: Path, _: str) -> Iterator[Row]:
    return _delimited_rows(path, "\t")


def _delimited_rows(path: Path, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text_of(path), newline=""), delimiter=delimiter, strict=True)
    try:
        header: list[str] = []
        line = 1  # the one that the next row begins on
        for cells in reader:
            if cells and not header:
                header = cells
                if len(set(header)) < len(header):
                    raise DataError(f"{path}:{line}: two columns of one name. Rename one.")
            elif cells:
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}:{line}: {'more' if len(cells) > len(header) else 'fewer'} cells "
                        f"than the header has. Quote cells that hold a '{delimiter}' or a line "
                        "break."
                    )
                yield f"{path.name}:{line}", dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: not CSV ({error}). Check the quotes."
        ) from error


def _parquet_rows(path: Path, _: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable Parquet file ({first}).") from error
    yield from _numbered(path, rows)


def _text_rows(path: Path, recite_prompt: str) -> Iterator[Row]:
    yield path.name, Record(prompt=recite_prompt, completion=text_of(path), id=path.name)


def _numbered(path: Path, rows: list[Any]) -> Iterator[Row]:
    yield from ((f"{path.name}:{n}", row) for n, row in enumerate(rows, 1))


def text_of(path: Path) -> str:
    """The file's text; refused if it isn't UTF-8, or is blank."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}).") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}). Save the file as UTF-8."
        ) from error
    if not text.strip():
        raise DataError(f"{path} is empty. Give at least one record.")
    return text


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        raise DataError(
            f"{where}: not JSON ({error.msg}, {place}). Correct or remove it."
        ) from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply. Correct or remove it.") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{where}: not readable ({error}). Put long numbers in quotes.") from error


READERS: dict[str, Reader] = {
    "jsonl": Reader(name="JSONL", suffixes=(".jsonl", ".ndjson"), rows=_jsonl_rows),
    "json": Reader(name="JSON", suffixes=(".json",), rows=_json_rows),
    "csv": Reader(name="CSV", suffixes=(".csv",), rows=_csv_rows),
    "tsv": Reader(name="TSV", suffixes=(".tsv",), rows=_tsv_rows),
    "parquet": Reader(name="Parquet", suffixes=(".parquet",), rows=_parquet_rows),
    "text": Reader(name="plain text", suffixes=(".txt", ".md"), rows=_text_rows),
}
