"""Rows of Python objects: lists, `datasets`, data frames, Arrow tables, NumPy arrays.

None of their libraries but pyarrow is imported: objects are told by what they can do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from memlaw.core.errors import DataError

_ARROW = ("__arrow_c_stream__", "__arrow_c_array__", "iloc")  # iloc: pandas before 2.2


def object_rows(source: Any, name: str = "record") -> Iterator[tuple[str, Any]]:
    """The rows of a Python object, each with its id, `name:1` and so on.

    Args:
        source: an iterable of rows; a `datasets` object; a data frame or table that gives Arrow
            (pandas, polars, pyarrow); or a NumPy array of rows.
        name: what ids begin with.

    Raises:
        DataError: it is something else, or holds several splits.
    """
    for n, row in enumerate(_rows(source), 1):
        if hasattr(row, "_asdict"):  # a named tuple
            row = row._asdict()
        if isinstance(row, tuple | list) and len(row) == 2 and not isinstance(row[0], Mapping):
            row = {"prompt": row[0], "completion": row[1]}
        if isinstance(row, Mapping):
            row = {field: _plain(value) for field, value in row.items()}
        yield f"{name}:{n}", row


def table_rows(table: Any, name: str) -> list[dict[str, Any]]:
    """The rows of an Arrow table or record batch; `name` is for messages.

    Raises:
        DataError: two columns have one name.
    """
    if len(set(table.schema.names)) < len(table.schema.names):
        raise DataError(f"{name}: two columns of one name. Rename one.")
    return table.to_pylist()


def _rows(source: Any) -> Iterable[Any]:
    if isinstance(source, Mapping) and source and all(map(_is_dataset, source.values())):
        if len(source) == 1:
            return _rows(next(iter(source.values())))
        first = next(iter(source))
        raise DataError(
            f"the data hold the splits {', '.join(map(str, source))}. Give one of them: "
            f"ds[{first!r}] in Python, the split's folder on the command line."
        )
    if _is_dataset(source):
        return source.with_format(None)
    if any(hasattr(source, name) for name in _ARROW):
        return _frame_rows(source)
    if hasattr(source, "dtype") and hasattr(source, "tolist"):
        names, rows = getattr(source.dtype, "names", None), source.tolist()
        if names and isinstance(rows, list):  # else a pair would go by position
            return [dict(zip(names, row, strict=True)) for row in rows]
        source = rows
    if isinstance(source, Mapping) and _are_columns(source):
        return [dict(zip(source, row, strict=True)) for row in zip(*source.values(), strict=True)]
    if not isinstance(source, Iterable) or isinstance(source, Mapping | bytes):
        raise DataError(
            f"records of type {type(source).__name__} are not understood. Give a path, a list of "
            "dicts, of (prompt, completion) pairs or of Records, a dict of lists of one length, a "
            "datasets.Dataset (one split of it: ds['train']), a data frame or an Arrow table."
        )
    return source


def _is_dataset(value: Any) -> bool:
    return hasattr(value, "with_format") and hasattr(value, "features")


def _are_columns(value: Mapping[Any, Any]) -> bool:
    """A dict of lists of one length: columns, as `Dataset.to_dict` gives them."""
    lists = list(value.values())
    return bool(lists) and all(
        isinstance(column, list) and len(column) == len(lists[0]) for column in lists
    )


def _frame_rows(frame: Any) -> list[dict[str, Any]]:
    import pyarrow as pa

    try:
        table = pa.table(frame)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(
            f"the {type(frame).__name__} can't be read as a table ({error}). Give a data frame "
            "whose columns have one type each: text, for prompts and completions."
        ) from error
    return table_rows(table, f"the {type(frame).__name__}")


def _plain(value: Any) -> Any:
    """Arrays and scalars of NumPy as Python's own."""
    return value.tolist() if hasattr(value, "tolist") else value
