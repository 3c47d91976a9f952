"""The tables of docs/data.md: every example in them is tried."""

import re
from pathlib import Path

import pytest

from memlaw.core.errors import DataError
from memlaw.data.layouts import LAYOUTS
from memlaw.data.readers import READERS
from memlaw.data.reading import read_records

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def _table(*header):
    """The rows of the table with this header: lists of cells, code marks and all."""
    lines = PAGE.split("| " + " | ".join(header) + " |\n")[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _code(cell):
    return re.findall(r"`([^`]+)`", cell)


def _content(cell):
    (code,) = _code(cell)
    return code.replace("⏎", "\n").replace("→", "\t")


def _prompt(cell):
    roles = re.findall(r"(\w+): `([^`]+)`", cell)
    return tuple({"role": r, "content": c} for r, c in roles) if roles else _content(cell)


FILES = _table("file", "content", "prompt", "completion")
FIELDS = _table("fields", "example", "prompt", "completion")
REFUSED = _table("file", "content", "the message says")


def test_the_formats_are_those_that_are_read():
    rows = PAGE.split("| format | suffix | |\n")[1].split("\n\n")[0].splitlines()[1:]
    said = {r.split("|")[1].strip(): tuple(_code(r.split("|")[2])) for r in rows}
    assert said == {reader.name: reader.suffixes for reader in READERS.values()}


def test_the_layouts_are_those_that_are_read_in_their_order():
    said = dict.fromkeys(tuple(_code(fields)) for fields, *_ in FIELDS)
    assert list(said) == [layout.fields for layout in LAYOUTS]


@pytest.mark.parametrize("row", FILES, ids=lambda row: row[1])
def test_a_file_is_read_as_the_page_says(tmp_path, row):
    name, content, prompt, completion = map(_content, row)
    (tmp_path / name).write_text(content, encoding="utf-8")
    record = read_records(tmp_path / name)[0]
    assert (record.prompt, record.completion) == (prompt, completion)


@pytest.mark.parametrize("row", FIELDS, ids=lambda row: row[1])
def test_fields_are_understood_as_the_page_says(tmp_path, row):
    fields, example, prompt, completion = row
    (tmp_path / "a.jsonl").write_text(_content(example), encoding="utf-8")
    said = []
    (record,) = read_records(tmp_path / "a.jsonl", notice=said.append)
    assert (record.prompt, record.completion) == (_prompt(prompt), _content(completion))
    simple = _code(fields) in (["messages"], ["prompt", "completion"])
    if "history" in example:
        assert "several answers" in said.pop()
    assert len(said) == (0 if simple else 1)
    assert all(f"'{field}'" in said[0] for field in _code(fields) if said)


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[1])
def test_data_are_refused_as_the_page_says(tmp_path, row):
    name, content, says = _content(row[0]), _content(row[1]), row[2]
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_records(tmp_path / name)
    assert says in str(caught.value)
