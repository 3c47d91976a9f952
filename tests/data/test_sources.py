"""Files and objects as other tools leave them."""

import builtins
import csv
import gzip
import json
from collections import namedtuple

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from memlaw.core.errors import ConfigError, DataError
from memlaw.data.reading import read_records

BOOK = [("Ann:", "017"), ("Zoë:", "2 3")]
ROWS = [{"prompt": p, "completion": c} for p, c in BOOK]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CHAT = [{"role": "user", "content": "Ann?"}, {"role": "assistant", "content": "017"}]


def _pairs(records):
    return [(r.prompt, r.completion) for r in records]


def _read(path, content, **settings):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_records(path, **settings)


# ---------------------------------------------------------------- packed files, encodings


def _zstd(raw):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(raw)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, "gz"), (_zstd, "zst")])
def test_packed_files_are_unpacked(tmp_path, pack, suffix):
    raw = LINES.encode()
    assert _pairs(_read(tmp_path / f"a.jsonl.{suffix}", pack(raw))) == BOOK
    assert _pairs(_read(tmp_path / f"a.JSONL.{suffix.upper()}", pack(raw))) == BOOK
    assert _pairs(_read(tmp_path / "b.jsonl", pack(raw))) == BOOK  # under a plain name
    first, rest = raw.split(b"\n", 1)
    assert _pairs(_read(tmp_path / f"c.jsonl.{suffix}", pack(first + b"\n") + pack(rest))) == BOOK
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    packed = pack((tmp_path / "a.parquet").read_bytes())
    assert _pairs(_read(tmp_path / f"a.parquet.{suffix}", packed)) == BOOK
    with pytest.raises(DataError, match=rf"d\.jsonl\.{suffix}: can't be unpacked"):
        _read(tmp_path / f"d.jsonl.{suffix}", pack(raw)[:-9])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
def test_the_encoding_is_told_by_the_first_bytes(tmp_path, encoding):
    table = "prompt\tcompletion\r\nAnn:\t017\r\nZoë:\t2 3\r\n".encode(encoding)
    assert _pairs(_read(tmp_path / "a.tsv", table)) == BOOK
    assert _pairs(_read(tmp_path / "a.csv", table)) == BOOK
    assert _pairs(_read(tmp_path / "a.jsonl", LINES.encode(encoding))) == BOOK


# ---------------------------------------------------------------- JSON


def test_json_values_of_several_lines_each_are_read_one_by_one(tmp_path):
    content = "\n".join(json.dumps(row, indent=1) for row in ROWS)
    for name in ("a.json", "a.jsonl"):
        records = _read(tmp_path / name, content)
        assert _pairs(records) == BOOK
        assert [r.id for r in records] == [f"{name}:1", f"{name}:2"]
    with pytest.raises(DataError, match=r"b\.json:6: not JSON"):
        _read(tmp_path / "b.json", content.replace('"Zo', "Zo"))


def test_lines_that_end_as_on_old_machines_are_read(tmp_path):
    assert _pairs(_read(tmp_path / "a.jsonl", LINES.replace("\n", "\r"))) == BOOK


def test_one_chat_in_an_object_is_one_record(tmp_path):
    for content in (json.dumps({"messages": CHAT}), json.dumps({"messages": CHAT}, indent=1)):
        for name in ("a.json", "a.jsonl"):
            (record,) = _read(tmp_path / name, content)
            assert record.completion == "017"


def test_a_list_in_an_object_is_named(tmp_path):
    said = []
    content = json.dumps({"info": {"n": 2}, "records": ROWS}, indent=1)
    assert _pairs(_read(tmp_path / "a.json", content, notice=said.append)) == BOOK
    assert said == ["a.json: the records are taken from the list 'records'."]


def test_a_data_frames_columns_are_refused(tmp_path):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(ROWS).to_json(tmp_path / "a.json")
    with pytest.raises(DataError, match="orient='records'"):
        read_records(tmp_path / "a.json")
    pandas.DataFrame(ROWS).to_json(tmp_path / "a.json", orient="records")
    assert _pairs(read_records(tmp_path / "a.json")) == BOOK


# ---------------------------------------------------------------- CSV and TSV


@pytest.mark.parametrize("delimiter", list(",;\t|"))
def test_a_delimiter_is_found_out_and_said(tmp_path, delimiter):
    rows = [("completion", "prompt", "note, or not"), ("0,1;7|\t", "Ann:", "")]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    said = []
    records = read_records(tmp_path / "a.csv", notice=said.append)
    assert _pairs(records) == [("Ann:", "0,1;7|\t")]
    found = [f"a.csv: the cells are delimited by {delimiter!r}."]
    assert said == ([] if delimiter == "," else found)


@pytest.mark.parametrize(
    ("given", "real"), [(":", ":"), ("tab", "\t"), (r"\t", "\t"), ("\t", "\t")]
)
def test_a_delimiter_can_be_named(tmp_path, given, real):
    content = f"prompt{real}completion{real}x;y;z;w\nAnn{real}017{real}\n"
    assert _pairs(_read(tmp_path / "a.csv", content, delimiter=given)) == [("Ann", "017")]


@pytest.mark.parametrize("delimiter", ["", "::", '"', "\n"])
def test_a_delimiter_is_one_character(tmp_path, delimiter):
    with pytest.raises(ConfigError, match="isn't one character"):
        _read(tmp_path / "a.csv", "prompt,completion\na,1\n", delimiter=delimiter)


@pytest.mark.parametrize("line", ["sep=|\r\n", "SEP=|\n", '"sep=|"\r\n', "sep=|;;\n"])
def test_the_line_that_names_a_delimiter_is_no_header(tmp_path, line):
    records = _read(tmp_path / "a.csv", "\ufeff" + line + "prompt|completion\nAnn:|017\n")
    assert _pairs(records) == [("Ann:", "017")]
    assert records[0].id == "a.csv:3"


def test_what_a_spreadsheet_leaves_empty_is_no_record(tmp_path):
    content = "prompt; completion ;;\r\nAnn:;017;;\r\n;;;\r\nZoë:;2 3; ;\r\n;\r\n;;;\r\n"
    assert _pairs(_read(tmp_path / "a.csv", content)) == BOOK


def test_text_in_a_column_without_a_name_is_not_lost_silently(tmp_path):
    content = "prompt,completion,\nAnn:,017,\nBo:,12 Elm Street, Ulm\n"
    with pytest.raises(DataError, match=r"a\.csv:3: more cells .*--delimiter"):
        _read(tmp_path / "a.csv", content)


def test_a_cell_may_be_long(tmp_path):
    text = "x" * 200_000
    ((_, found),) = _pairs(_read(tmp_path / "a.csv", f"prompt,completion\na,{text}\n"))
    assert found == text


def test_quotes_of_a_tsv_are_kept_and_told(tmp_path):
    said = []
    content = 'prompt\tcompletion\na\t"one\nb\ttwo"\nc\t6" pipe\n"d"\t1\n'
    pairs = _pairs(_read(tmp_path / "a.tsv", content, notice=said.append))
    assert pairs == [("a", '"one'), ("b", 'two"'), ("c", '6" pipe'), ('"d"', "1")]
    assert len(said) == 1
    assert "2 line(s)" in said[0]
    assert "--data-format csv" in said[0]
    quoted = 'prompt\tcompletion\na\t"one\ntwo"\n'
    assert _pairs(_read(tmp_path / "b.tsv", quoted, format="csv")) == [("a", "one\ntwo")]


# ---------------------------------------------------------------- tables and objects


def test_parquet_and_arrow_of_nested_dictionary_and_large_types(tmp_path):
    prompts = pa.array(["Ann:", "Zoë:"]).dictionary_encode()
    table = pa.table({"prompt": prompts, "completion": pa.array(["017", "2 3"], pa.large_string())})
    chats = pa.table(
        {
            "messages": pa.array(
                [CHAT],
                pa.large_list(pa.struct([("role", pa.string()), ("content", pa.large_string())])),
            )
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    pq.write_table(chats, tmp_path / "chats.parquet")
    feather.write_feather(table, tmp_path / "a.feather")
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    for name in ("a.parquet", "a.feather", "a.arrow"):
        records = read_records(tmp_path / name)
        assert _pairs(records) == BOOK
        assert [r.id for r in records] == [f"{name}:1", f"{name}:2"]
    assert _pairs(read_records(tmp_path / "chats.parquet")) == [((CHAT[0],), "017")]
    (tmp_path / "bad.arrow").write_bytes(b"ARROW1 no")
    with pytest.raises(DataError, match=r"bad\.arrow: not a readable Arrow file"):
        read_records(tmp_path / "bad.arrow")


def test_two_columns_of_one_name_are_refused(tmp_path):
    twice = pa.table([["Ann:"], ["017"], ["018"]], names=["prompt", "completion", "completion"])
    pq.write_table(twice, tmp_path / "a.parquet")
    for source in (twice, tmp_path / "a.parquet"):
        with pytest.raises(DataError, match="two columns of one name"):
            read_records(source)


def _frame(rows):
    return pytest.importorskip("pandas").DataFrame(rows)


Swapped = namedtuple("Swapped", "completion prompt")
OBJECTS = {
    "a data frame": lambda: _frame(ROWS),
    "a data frame with an index of its own": lambda: _frame(ROWS).set_index([[7, 9]]),
    "rows of a data frame": lambda: _frame(ROWS).to_dict("records"),
    "named tuples": lambda: _frame(ROWS)[["completion", "prompt"]].itertuples(index=False),
    "named tuples, swapped": lambda: [Swapped(c, p) for p, c in BOOK],
    "a table": lambda: pa.Table.from_pylist(ROWS),
    "a record batch": lambda: pa.RecordBatch.from_pylist(ROWS),
    "a reader of batches": lambda: pa.Table.from_pylist(ROWS).to_reader(),
    "a dataset that gives arrays": lambda: Dataset.from_list(ROWS).with_format("numpy"),
    "a dataset that gives frames": lambda: Dataset.from_list(ROWS).with_format("pandas"),
    "a selection of a dataset": lambda: Dataset.from_list([ROWS[0], *ROWS]).select([1, 2]),
    "a streamed dataset": lambda: IterableDataset.from_generator(lambda: iter(ROWS)),
    "one split": lambda: DatasetDict(train=Dataset.from_list(ROWS)),
    "an array of two columns": lambda: np.array(BOOK),
    "an array of objects": lambda: np.array(ROWS, dtype=object),
    "a structured array, swapped": lambda: np.array(
        [(c, p) for p, c in BOOK], dtype=[("completion", "U9"), ("prompt", "U9")]
    ),
    "strings of NumPy": lambda: [{k: np.str_(v) for k, v in row.items()} for row in ROWS],
}


@pytest.mark.parametrize("case", OBJECTS)
def test_objects_of_other_libraries_are_read(case):
    records = read_records(OBJECTS[case]())
    assert _pairs(records) == BOOK
    assert all(type(r.prompt) is str for r in records)
    assert [r.id for r in records] == ["record:1", "record:2"]


def test_chats_in_arrays_are_read(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"messages": CHAT}]), tmp_path / "a.parquet")
    frame = pytest.importorskip("pandas").read_parquet(tmp_path / "a.parquet")
    assert isinstance(frame["messages"][0], np.ndarray)
    for source in (frame, frame.to_dict("records")):
        assert _pairs(read_records(source)) == [((CHAT[0],), "017")]


def test_missing_cells_of_a_data_frame_are_empty():
    frame = _frame([*ROWS, {"prompt": "Bo:", "completion": None}])
    texts = frame.astype("string")
    for source in (
        frame,
        frame.to_dict("records"),
        texts,
        texts.to_dict("records"),
        [{"prompt": "a", "completion": float("nan")}],
    ):
        with pytest.raises(DataError, match=r"record:[13]: field 'completion' is empty"):
            read_records(source)


def test_a_column_of_several_types_is_refused():
    with pytest.raises(DataError, match=r"the DataFrame can't be read as a table .*one type"):
        read_records(_frame([ROWS[0], {"prompt": "Bo:", "completion": 17}]))
    with pytest.raises(DataError, match="the Series can't be read as a table"):
        read_records(_frame(ROWS)["prompt"])


def test_folders_that_datasets_wrote_are_read(tmp_path):
    dataset = Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict(train=dataset).save_to_disk(tmp_path / "one")
    DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "two")
    for name in ("saved", "one", "two/test"):
        records = read_records(tmp_path / name)
        assert _pairs(records) == BOOK
        assert records[0].id == f"{(tmp_path / name).name}:1"
    with pytest.raises(DataError, match="the splits train, test"):
        read_records(tmp_path / "two")
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(DataError, match="saved: datasets can't read the folder"):
        read_records(tmp_path / "saved")


def test_a_folder_of_datasets_needs_datasets(tmp_path, monkeypatch):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match="pip install datasets"):
        read_records(tmp_path / "saved")


def test_another_folder_is_refused_with_what_it_holds(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl.gz").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"It holds data.train\.jsonl\.gz\.$"):
        read_records(tmp_path)


TEXTS = {
    "rows.txt": ('{"prompt": "a", "completion": "b"}\n', "jsonl"),
    "excel.txt": ("prompt\tcompletion\na\tb\n", "tsv"),
    "table.md": ("question;answer\na;b\n", "csv"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_seems_to_hold_records_is_told(tmp_path, name):
    content, format = TEXTS[name]
    (tmp_path / name).write_text(content, encoding="utf-16" if "excel" in name else "utf-8")
    said = []
    (record,) = read_records(tmp_path / name, notice=said.append)
    assert record.completion == content
    assert said[0].endswith(f"say --data-format {format}.")
    (record,) = read_records(tmp_path / name, format=format, notice=said.append)
    assert (record.prompt, record.completion) == ("a", "b")
    (tmp_path / name).write_text("Once, there was a heron; it sang.\n")
    assert read_records(tmp_path / name, notice=pytest.fail)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("someone/records", r"load_dataset\('someone/records'"),
        ("https://example.org/a.jsonl", "download it first"),
        ("nowhere/a.jsonl", r"Check the path of the records\.$"),
    ],
)
def test_records_that_are_not_here(name, says):
    with pytest.raises(DataError, match=f"does not exist. .*{says}"):
        read_records(name)


def test_files_that_were_put_together_may_have_marks_within(tmp_path):
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (tmp_path / "a.jsonl").write_text("".join("\ufeff" + line for line in lines), encoding="utf-8")
    assert len(read_records(tmp_path / "a.jsonl")) == len(ROWS)


def test_a_dict_of_columns_is_a_table():
    (record,) = read_records({"prompt": ["Ann:"], "completion": ["017"]})
    assert (record.prompt, record.completion) == ("Ann:", "017")
    with pytest.raises(DataError, match="a dict of lists of one length"):
        read_records({"prompt": ["Ann:", "Bo:"], "completion": ["017"]})
