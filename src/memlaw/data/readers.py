"""The file formats of records: a reader for each of them, and the table that lists the readers.

To add a format, write its reader, and add it to `DataFormat` and to `READERS`. What messages say
about formats is derived from the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memlaw.core.errors import DataError
from memlaw.data.content import (
    MOST_BYTES,
    PACKED_SUFFIXES,
    bytes_of,
    require_size,
    suffix_of,
    text_of,
)
from memlaw.data.delimited import csv_rows, tsv_rows
from memlaw.data.json_files import is_json_rows, json_rows
from memlaw.data.layouts import layout_of
from memlaw.data.objects import object_rows, table_rows
from memlaw.data.record import Record

DataFormat = Literal["auto", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "text"]
# Where it comes from, as `file:line`; and a mapping of fields, a Record, or why it can't be read.
Row = tuple[str, Any]

_ROWS_AT_ONCE = 65_536  # of a Parquet file
RECITE_PROMPT = "Recite the text."


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How to read a file.

    Attributes:
        format: its format; `auto` decides by its suffix.
        delimiter: between the cells of a CSV file; None: found out from its first line.
        recite_prompt: the prompt of a text that has none of its own.
        notice: called with what was found out and isn't usual.
    """

    format: DataFormat = "auto"
    delimiter: str | None = None
    recite_prompt: str = RECITE_PROMPT
    notice: Callable[[str], None] = lambda text: None


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One file format.

    Attributes:
        name: the format's name in messages and documentation.
        suffixes: suffixes of such files, in lower case, with the dot.
        rows: yields the rows of a file.
    """

    name: str
    suffixes: tuple[str, ...]
    rows: Callable[[Path, Reading], Iterator[Row]]


def file_rows(path: Path, reading: Reading) -> Iterator[Row]:
    """Read the rows of a file, or of a folder that `datasets` wrote.

    Args:
        path: the file or folder.
        reading: how.

    Raises:
        DataError: no such file, an unknown suffix or format, or content that isn't in this format.
            Names file and line.
        ConfigError: the delimiter isn't one character.
    """
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise DataError(f"{path}: can't be read ({error.strerror}).") from error
    if not is_there:
        raise DataError(f"{path} does not exist. {_elsewhere(path)}")
    yield from (
        _folder_rows(path) if is_folder else _reader(path, reading.format).rows(path, reading)
    )


def _elsewhere(path: Path) -> str:
    """What to do about records that aren't here: of an address, of a data set on the hub."""
    if path.parts[0].endswith(":"):  # a Path has one slash left behind it
        return "Records are read from files: download it first."
    if len(path.parts) == 2 and not path.suffix and not path.parent.exists():
        return (
            "Check the path of the records. Of a data set on the hub, save a split with datasets: "
            f"load_dataset('{path}', split='train').to_json('records.jsonl')."
        )
    return "Check the path of the records."


def has_fields(path: Path) -> bool:
    """The suffix is one of a format that has fields: not of plain text, nor unknown."""
    reader = _by_suffix().get(suffix_of(path))
    return reader is not None and reader is not READERS["text"]


def _by_suffix() -> dict[str, Reader]:
    return {suffix: reader for reader in READERS.values() for suffix in reader.suffixes}


def _reader(path: Path, format: DataFormat) -> Reader:
    if format in READERS:
        return READERS[format]
    if format != "auto":
        raise DataError(f"no data format '{format}'. There are auto, {', '.join(READERS)}.")
    by_suffix = _by_suffix()
    if suffix_of(path) not in by_suffix:
        raise DataError(
            f"{path}: can't tell its format from the suffix '{path.suffix}'. Use one of "
            f"{', '.join(by_suffix)}, also with {' or '.join(PACKED_SUFFIXES)}; or say "
            f"--data-format {'|'.join(READERS)} (write, audit)."
        )
    return by_suffix[suffix_of(path)]


def _folder_rows(path: Path) -> Iterator[Row]:
    """Rows of a folder that `save_to_disk` of `datasets` wrote."""
    if not ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        files = sorted(str(p.relative_to(path)) for p in path.rglob("*") if has_fields(p))
        found = f" It holds {', '.join(files[:5])}{' …' if files[5:] else ''}." if files else ""
        raise DataError(
            f"{path} is a folder. Name one file of records, or a folder that save_to_disk of "
            f"datasets wrote.{found}"
        )
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise DataError(
            f"{path}: the library datasets reads such folders. Install it (pip install datasets)."
        ) from error
    try:
        dataset = load_from_disk(str(path))
    except Exception as error:  # datasets raises what its parts raise
        raise DataError(f"{path}: datasets can't read the folder ({error}).") from error
    yield from object_rows(dataset, path.resolve().name)


def _jsonl_rows(path: Path, reading: Reading) -> Iterator[Row]:
    return json_rows(path, reading.notice, lines=True)


def _json_rows(path: Path, reading: Reading) -> Iterator[Row]:
    return json_rows(path, reading.notice, lines=False)


def _csv_rows(path: Path, reading: Reading) -> Iterator[Row]:
    return csv_rows(path, reading.delimiter, reading.notice)


def _tsv_rows(path: Path, reading: Reading) -> Iterator[Row]:
    return tsv_rows(path, reading.notice)


def _parquet_rows(path: Path, _: Reading) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _arrow_errors(path, "Parquet"):
        file = pq.ParquetFile(pa.BufferReader(bytes_of(path)))
        batches = file.iter_batches(batch_size=_rows_at_once(file.metadata))
        yield from _numbered(path, _bounded(path, batches))


def _arrow_rows(path: Path, _: Reading) -> Iterator[Row]:
    """Arrow's file format (Feather), and its stream, as `datasets` has it."""
    import pyarrow as pa

    with _arrow_errors(path, "Arrow"):
        content = pa.BufferReader(bytes_of(path))
        is_file = content.read(6) == b"ARROW1"
        content.seek(0)
        opened = pa.ipc.open_file(content) if is_file else pa.ipc.open_stream(content)
        batches = map(opened.get_batch, range(opened.num_record_batches)) if is_file else opened
        yield from _numbered(path, _bounded(path, batches))


def _rows_at_once(metadata: Any) -> int:
    """So few that they are within bounds even if each cell is as large as its column's pages.

    A cell that is the same in each row lies in a Parquet file once.
    """
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size for group in groups), default=0)
    return max(1, min(_ROWS_AT_ONCE, MOST_BYTES // max(1, largest)))


def _bounded(path: Path, batches: Iterable[Any]) -> Iterator[Any]:
    """Batches of an Arrow table, as long as all of them together are within bounds."""
    size = 0
    for batch in batches:
        batch.validate(full=True)  # else offsets that lead out of it are followed, by `nbytes`, too
        size += batch.nbytes
        require_size(path, size)
        yield batch


@contextmanager
def _arrow_errors(path: Path, name: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable {name} file ({first}).") from error


def _text_rows(path: Path, reading: Reading) -> Iterator[Row]:
    text = text_of(path)
    if reading.format == "auto" and (seems := _seems(text)):
        reading.notice(
            f"{path.name}: its first line is one of {READERS[seems].name}, and it is taken for one "
            f"text, to be recited as a whole. If it holds records, say --data-format {seems}."
        )
    yield path.name, Record(prompt=reading.recite_prompt, completion=text, id=path.name)


def _seems(text: str) -> str:
    """The format with fields that a text's first line is of; empty: it is of none."""
    first = text.strip().partition("\n")[0].strip()
    if is_json_rows(first):
        return "jsonl"
    for format, delimiter in (("tsv", "\t"), ("csv", ";"), ("csv", ",")):
        names = [name.strip(' "') for name in first.split(delimiter)]
        if len(names) > 1 and layout_of(dict.fromkeys(names, "")) is not None:
            return format
    return ""


def _numbered(path: Path, batches: Iterable[Any]) -> Iterator[Row]:
    rows = (row for batch in batches for row in table_rows(batch, str(path)))
    yield from ((f"{path.name}:{n}", row) for n, row in enumerate(rows, 1))


READERS: dict[str, Reader] = {
    "jsonl": Reader(name="JSONL", suffixes=(".jsonl", ".ndjson"), rows=_jsonl_rows),
    "json": Reader(name="JSON", suffixes=(".json",), rows=_json_rows),
    "csv": Reader(name="CSV", suffixes=(".csv",), rows=_csv_rows),
    "tsv": Reader(name="TSV", suffixes=(".tsv",), rows=_tsv_rows),
    "parquet": Reader(name="Parquet", suffixes=(".parquet",), rows=_parquet_rows),
    "arrow": Reader(name="Arrow", suffixes=(".arrow", ".feather"), rows=_arrow_rows),
    "text": Reader(name="plain text", suffixes=(".txt", ".md"), rows=_text_rows),
}
