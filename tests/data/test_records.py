"""Reading records from every format, refusing what can't be recalled, and turning text to tokens.

What is trained on and what is asked come from the same functions; these tests hold them to it.
"""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict

import memlaw
from memlaw.cli.dispatch import run
from memlaw.core.errors import ConfigError, DataError, ModelError
from memlaw.data.encoding import (
    encode,
    encode_prompt,
    end_of_turn_id,
    refuse_long,
    resolve_prompt_format,
)
from memlaw.data.readers import READERS, RECITE_PROMPT, DataFormat
from memlaw.data.reading import read_records
from memlaw.data.record import Record

BOOK = [("Ann:", "017"), ("Zoë:", "2\n 3")]
ROWS = [{"prompt": p, "completion": c} for p, c in BOOK]


def _pairs(records):
    return [(r.prompt, r.completion) for r in records]


def _lines(rows, **settings):
    return "".join(json.dumps(row, **settings) + "\n" for row in rows).encode()


def _parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


# ---------------------------------------------------------------- formats

FILES = {
    # name: (file name, content, ids)
    "JSONL": ("a.jsonl", _lines(ROWS), ["a.jsonl:1", "a.jsonl:2"]),
    "JSONL in UTF-8": ("a.jsonl", _lines(ROWS, ensure_ascii=False), ["a.jsonl:1", "a.jsonl:2"]),
    "JSONL with a BOM": ("a.jsonl", b"\xef\xbb\xbf" + _lines(ROWS), ["a.jsonl:1", "a.jsonl:2"]),
    "JSONL of Windows": (
        "a.jsonl",
        _lines(ROWS).replace(b"\n", b"\r\n"),
        ["a.jsonl:1", "a.jsonl:2"],
    ),
    "JSONL with blank lines": (
        "a.jsonl",
        b"\n" + _lines(ROWS[:1]) + b" \n\n" + _lines(ROWS[1:]).rstrip(),
        ["a.jsonl:2", "a.jsonl:5"],
    ),
    "NDJSON": ("a.ndjson", _lines(ROWS), ["a.ndjson:1", "a.ndjson:2"]),
    "JSON": ("a.json", json.dumps(ROWS, indent=1).encode(), ["a.json:1", "a.json:2"]),
    "CSV": (
        "a.csv",
        'prompt,completion\nAnn:,017\nZoë:,"2\n 3"\n'.encode(),
        ["a.csv:2", "a.csv:3"],
    ),
    "CSV with a BOM and other columns": (
        "a.CSV",
        b'\xef\xbb\xbf"prompt",n,completion\nAnn:,1,017\n' + '"Zoë:",,"2\n 3"\n'.encode(),
        ["a.CSV:2", "a.CSV:3"],
    ),
    "CSV with blank lines and a header of two lines": (
        "a.csv",
        'prompt,completion,"no\nte"\n\n"Ann:",017,"a\nb"\n\n"Zoë:","2\n 3",\n'.encode(),
        ["a.csv:4", "a.csv:7"],
    ),
    "TSV": (
        "a.tsv",
        'prompt\tcompletion\r\n\r\nAnn:\t017\r\n"Zoë:"\t"2'.encode(),
        ["a.tsv:3", "a.tsv:4"],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_read_by_its_suffix(tmp_path, case):
    name, content, ids = FILES[case]
    (tmp_path / name).write_bytes(content)
    records = read_records(tmp_path / name)
    assert _pairs(records) == (BOOK if case != "TSV" else [BOOK[0], ('"Zoë:"', '"2')])
    assert [r.id for r in records] == ids
    assert read_records(str(tmp_path / name)) == records


def test_parquet_is_read(tmp_path):
    _parquet(tmp_path / "a.parquet", ROWS)
    records = read_records(tmp_path / "a.parquet")
    assert _pairs(records) == BOOK
    assert [r.id for r in records] == ["a.parquet:1", "a.parquet:2"]


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_text_file_is_one_record_to_the_last_space(tmp_path, suffix):
    text = "\n  One\r\n\ttwo \u00a0\u2028 three\x0c\n\n "
    path = tmp_path / f"a{suffix}"
    path.write_bytes(text.encode())
    (record,) = read_records(path)
    assert record == Record(prompt=RECITE_PROMPT, completion=text, id=path.name)
    (record,) = read_records(path, recite_prompt="Go on.")
    assert record.prompt == "Go on."


def test_a_format_that_is_named_overrides_the_suffix(tmp_path):
    path = tmp_path / "a.dat"
    path.write_bytes(_lines(ROWS))
    assert _pairs(read_records(path, format="jsonl")) == BOOK
    (whole,) = read_records(path, format="text")
    assert whole.completion == path.read_text(encoding="utf-8")


def test_the_formats_are_those_of_the_table_of_readers(tmp_path):
    assert get_args(DataFormat) == ("auto", *READERS)
    suffixes = [suffix for reader in READERS.values() for suffix in reader.suffixes]
    assert len(set(suffixes)) == len(suffixes)
    (tmp_path / "a.jsonl").write_bytes(_lines(ROWS))
    with pytest.raises(DataError, match=r"no data format 'poem'. There are auto, jsonl, json"):
        read_records(tmp_path / "a.jsonl", format="poem")


@pytest.mark.parametrize("name", [reader.name for reader in READERS.values()])
def test_every_format_is_named_where_people_look(capsys, name):
    run(["--help"])
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for text in (read_records.__doc__, capsys.readouterr().out, page):
        assert name in " ".join(text.split())


OBJECTS = {
    "dicts": ROWS,
    "pairs": BOOK,
    "lists of two": [list(pair) for pair in BOOK],
    "a generator": (pair for pair in BOOK),
    "a dataset": Dataset.from_list(ROWS),
}


@pytest.mark.parametrize("case", OBJECTS)
def test_python_objects_are_read(case):
    records = read_records(OBJECTS[case])
    assert _pairs(records) == BOOK
    assert [r.id for r in records] == ["record:1", "record:2"]


def test_records_are_taken_as_they_are():
    records = [Record(prompt=p, completion=c, id=f"mine {c}") for p, c in BOOK]
    assert read_records(records) == records


MESSAGES = [
    {"role": "system", "content": "You are a phone book."},
    {"role": "user", "content": "Ann?"},
    {"role": "assistant", "content": "017"},
]
CHATS = {
    "messages": {"messages": MESSAGES},
    "prompt and completion as messages": {"prompt": MESSAGES[:2], "completion": MESSAGES[2:]},
    "messages beside other fields": {"messages": MESSAGES, "prompt": "x", "source": "y"},
}


@pytest.mark.parametrize("form", ["objects", "jsonl", "parquet", "dataset"])
@pytest.mark.parametrize("case", CHATS)
def test_chats_are_read(tmp_path, case, form):
    source = [CHATS[case]]
    if form == "jsonl":
        source = tmp_path / "a.jsonl"
        source.write_bytes(_lines([CHATS[case]]))
    elif form == "parquet":
        source = tmp_path / "a.parquet"
        _parquet(source, [CHATS[case]])
    elif form == "dataset":
        source = Dataset.from_list([CHATS[case]])
    (record,) = read_records(source)
    assert record.prompt == tuple(MESSAGES[:2])
    assert record.completion == "017"
    assert record.title == "Ann?"


@pytest.mark.parametrize(
    ("names", "row"),
    [
        ({"prompt_field": "q", "completion_field": "a"}, {"q": "Ann:", "a": "017"}),
        ({"prompt_field": "q"}, {"q": "Ann:", "completion": "017", "prompt": "no"}),
        ({"completion_field": "a"}, {"prompt": "Ann:", "a": "017", "messages": []}),
    ],
)
def test_fields_go_by_the_names_given(tmp_path, names, row):
    (tmp_path / "a.jsonl").write_bytes(_lines([row]))
    for source in (tmp_path / "a.jsonl", [row]):
        assert _pairs(read_records(source, **names)) == [("Ann:", "017")]


def test_a_title_is_one_line():
    assert Record(prompt=" a \n\n b ", completion="c", id="x").title == "a b"


def test_a_records_identity_is_prompt_and_completion():
    record = Record(prompt="Zoë:", completion="1", id="a")
    assert record.sha256 == Record(prompt="Zoë:", completion="1", id="b").sha256
    chat = Record(prompt=({"role": "user", "content": "Zoë:"},), completion="1", id="a")
    swapped = Record(prompt=({"content": "Zoë:", "role": "user"},), completion="1", id="a")
    others = [
        Record(prompt="Zoë: ", completion="1", id="a"),
        Record(prompt="Zoë:", completion="1 ", id="a"),
        Record(prompt="Zoë:1", completion="", id="a"),
        chat,
    ]
    assert swapped.sha256 == chat.sha256
    assert len({r.sha256 for r in [record, *others]}) == 5


# ---------------------------------------------------------------- duplicates and contradictions


def test_exact_duplicates_are_merged_and_said_so():
    said = []
    records = read_records([*ROWS, ROWS[0], ROWS[0]], notice=said.append)
    assert _pairs(records) == BOOK
    assert said == ["2 exact duplicate(s) merged: record:3 = record:1, record:4 = record:1"]


def test_nothing_is_said_when_nothing_was_put_right():
    said = []
    read_records(ROWS, notice=said.append)
    assert said == []


def test_contradictions_are_listed():
    rows = [("Ann:", "1"), ("Bo:", "2"), ("Ann:", "3"), ("Bo:", "4" * 60)]
    with pytest.raises(DataError) as caught:
        read_records(rows)
    assert str(caught.value).startswith("2 prompt(s) with different completions")
    assert "record:1 and record:3: 'Ann:' -> '1' or '3'" in str(caught.value)
    assert f"record:2 and record:4: 'Bo:' -> '2' or '{'4' * 39}…'" in str(caught.value)


def test_many_contradictions_are_cut_short():
    rows = [(f"{i}:", str(n)) for n in range(2) for i in range(9)]
    with pytest.raises(DataError, match=r"9 prompt\(s\)[\s\S]* and 4 more$"):
        read_records(rows)


def test_a_difference_in_white_space_is_a_difference():
    records = read_records([("Ann:", "1"), ("Ann: ", "2"), ("Ann:\n", "3")])
    assert len(records) == 3


def test_records_need_ids_of_their_own():
    records = [Record(prompt=p, completion=c, id="same") for p, c in BOOK]
    with pytest.raises(DataError, match="share one id"):
        read_records(records)


# ---------------------------------------------------------------- bad input

BAD_FILES = {
    # name: (file name, content, what the message says)
    "empty": ("a.jsonl", b"", ["a.jsonl is empty"]),
    "blank": ("a.txt", b" \n\t\n", ["a.txt is empty"]),
    "only a BOM": ("a.csv", b"\xef\xbb\xbf", ["a.csv is empty"]),
    "only a header": ("a.csv", b"prompt,completion\n", ["a.csv holds no records"]),
    "empty array": ("a.json", b"[]", ["a.json holds no records"]),
    "malformed line": (
        "a.jsonl",
        _lines(ROWS) + b"\n{'prompt': 1}\n",
        ["a.jsonl:4: not JSON", "column 2"],
    ),
    "malformed array": ("a.json", b'[\n{"prompt": "a"},\n{]', ["a.json:3: not JSON", "column 2"]),
    "one object": ("a.json", b'{"prompt": "a"}', ["a.json:1: no field 'completion'"]),
    "a line that is no object": ("a.jsonl", b'"a"\n', ["a.jsonl:1: str instead of an object"]),
    "nested too deeply": ("a.jsonl", b"[" * 100_000, ["a.jsonl:1"]),
    "a number of 5000 digits": (
        "a.jsonl",
        b'{"prompt": "a", "completion": ' + b"1" * 5000 + b"}",
        ["a.jsonl:1", "quotes"],
    ),
    "no prompt": (
        "a.jsonl",
        _lines([*ROWS, {"name": "a", "completion": "b"}]),
        ["a.jsonl:3: no field 'prompt'", "name, completion", "--prompt-field"],
    ),
    "no completion": (
        "a.csv",
        b"prompt,number\nAnn:,1\n",
        ["a.csv:2: no field 'completion'", "prompt, number", "--completion-field"],
    ),
    "an int": (
        "a.jsonl",
        b'{"prompt": "a", "completion": 17}',
        ["a.jsonl:1: field 'completion' is a int (17), not text", "quotes"],
    ),
    "a float": (
        "a.json",
        b'[{"prompt": 0.10, "completion": "a"}]',
        ["a.json:1: field 'prompt' is a float (0.1), not text"],
    ),
    "null": (
        "a.jsonl",
        b'{"prompt": "a", "completion": null}',
        ["a.jsonl:1: field 'completion' is empty"],
    ),
    "an empty prompt": (
        "a.csv",
        b"prompt,completion\na,1\n,2\n",
        ["a.csv:3: field 'prompt' is empty"],
    ),
    "white space": (
        "a.jsonl",
        b'{"prompt": "a", "completion": " \\n"}',
        ["a.jsonl:1: field 'completion' is empty"],
    ),
    "too many cells": (
        "a.csv",
        b'prompt,completion\n"a\nb",1\nc,2,3\n',
        ["a.csv:4: more cells", "','"],
    ),
    "too few cells": (
        "a.tsv",
        b"prompt\tcompletion\na\n",
        ["a.tsv:2: fewer cells", "In TSV no cell"],
    ),
    "an open quote": ("a.csv", b'prompt,completion\na,"1\n', ["a.csv:2: not CSV", "quotes"]),
    "text behind a quote": ("a.csv", b'prompt,completion\na,"1"2\n', ["a.csv:2: not CSV"]),
    "a column twice": ("a.csv", b"prompt,prompt\na,1\n", ["a.csv:1: two columns of one name"]),
    "not UTF-8": ("a.txt", b"one\ntwo\nZo\xeb\n", ["a.txt:3: not UTF-8 (byte 0xeb)"]),
    "half of UTF-16": (
        "a.csv",
        "prompt,completion\n".encode("utf-16")[:-1],
        ["a.csv:1: not UTF-16", "as UTF-8"],
    ),
    "an unknown suffix": ("a.docx", b"a", ["a.docx: can't tell", "'.docx'", "--data-format"]),
    "no suffix": ("data", b"a", ["can't tell its format", "--data-format"]),
    "not Parquet": ("a.parquet", b"prompt,completion\n", ["a.parquet: not a readable Parquet"]),
    "half a surrogate pair": (
        "a.jsonl",
        b'{"prompt": "a", "completion": "12\\ud83d"}',
        ["a.jsonl:1: field 'completion' holds half a surrogate pair at character 2"],
    ),
    "user last": (
        "a.jsonl",
        _lines([{"messages": MESSAGES[:2]}]),
        ["a.jsonl:1: the last message is from 'user'"],
    ),
    "one message": (
        "a.jsonl",
        _lines([{"messages": MESSAGES[2:]}]),
        ["a.jsonl:1: 'messages' must be a list of at least two"],
    ),
    "a message without content": (
        "a.jsonl",
        _lines([{"messages": [{"role": "user"}, MESSAGES[2]]}]),
        ["a.jsonl:1: message 1 needs the fields 'role' and 'content'"],
    ),
    "content in parts": (
        "a.jsonl",
        _lines([{"messages": [{"role": "user", "content": [{"image": "a"}]}, MESSAGES[2]]}]),
        ["a.jsonl:1: field 'messages[1].content' is a list"],
    ),
    "half a chat": (
        "a.jsonl",
        _lines([{"prompt": MESSAGES[:2], "completion": ["017"]}]),
        ["a.jsonl:1: message 3 needs the fields"],
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_with_file_and_line(tmp_path, case):
    name, content, said = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_records(tmp_path / name)
    for part in said:
        assert part in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no\.jsonl does not exist"):
        read_records(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_records(tmp_path)
    with pytest.raises(DataError, match=r"a\.jsonl: can't be read .File name too long"):
        read_records(tmp_path / f"{'a' * 5000}.jsonl")


def test_a_parquet_column_of_numbers_is_refused(tmp_path):
    _parquet(tmp_path / "a.parquet", [{"prompt": "a", "completion": 17}])
    with pytest.raises(DataError, match=r"a\.parquet:1: field 'completion' is a int \(17\)"):
        read_records(tmp_path / "a.parquet")


BAD_OBJECTS = {
    "nothing": ([], "the data holds no records"),
    "a number": (5, "of type int are not understood"),
    "none": (None, "of type NoneType are not understood"),
    "bytes": (b"a", "of type bytes are not understood"),
    "one dict": (ROWS[0], "of type dict are not understood"),
    "splits of a dataset": (
        DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS)),
        r"the splits train, test. Give one of them: ds\['train'\]",
    ),
    "strings": (["abc"], "record:1: str instead of an object"),
    "numbers in a tensor": (torch.zeros(2, 2), "record:1: field 'prompt' is a float"),
    "triples": ([("a", "b", "c")], "record:1: tuple instead of an object"),
    "a pair of numbers": ([("a", 1)], r"record:1: field 'completion' is a int \(1\)"),
    "a record without a prompt": ([Record(prompt=" ", completion="1", id="x")], "x: field 'p"),
    "a record without a completion": ([Record(prompt="a", completion="", id="x")], "x: field 'c"),
    "a record of a number": ([Record(prompt="a", completion=1, id="x")], "x: field 'completion'"),
    "a record of half a chat": (
        [Record(prompt=({"role": "user"},), completion="a", id="x")],
        "x: message 1 needs",
    ),
}


@pytest.mark.parametrize("case", BAD_OBJECTS)
def test_bad_objects_are_refused(case):
    source, said = BAD_OBJECTS[case]
    with pytest.raises(DataError, match=said):
        read_records(source)


# ---------------------------------------------------------------- tokens


def _one(prompt, completion):
    return [Record(prompt=prompt, completion=completion, id="x")]


@pytest.mark.parametrize("prompt", ["Ann?", tuple(MESSAGES[:2])])
def test_a_chat_prompt_is_the_templates_with_its_generation_prompt(chat_tokenizer, prompt):
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    (example,) = encode(_one(prompt, "017"), chat_tokenizer, format="chat")
    expected = chat_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert list(example.prompt_ids) == expected
    assert example.prompt_ids == encode_prompt(chat_tokenizer, prompt, "chat")


def test_a_plain_prompt_is_its_text(plain_tokenizer):
    (example,) = encode(_one("Ann?", "017"), plain_tokenizer, format="plain")
    assert plain_tokenizer.decode(example.prompt_ids) == "Ann?"
    assert example.prompt_ids == encode_prompt(plain_tokenizer, "Ann?", "plain")
    chat = encode_prompt(plain_tokenizer, tuple(MESSAGES[:2]), "plain")
    assert plain_tokenizer.decode(chat) == "You are a phone book.\nAnn?"


@pytest.mark.parametrize("adds", ["begin", "end", "both"])
def test_a_plain_prompt_keeps_bos_and_drops_eos(make_tokenizer, adds):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer("plain")
    begin, end = "<|im_start|>", "<|endoftext|>"
    form = {"begin": f"{begin} $A", "end": f"$A {end}", "both": f"{begin} $A {end}"}[adds]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=form,
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in (begin, end)],
    )
    text = tokenizer.decode(encode_prompt(tokenizer, "Ann?", "plain"))
    assert text == ("Ann?" if adds == "end" else begin + "Ann?")


@pytest.mark.parametrize(
    ("kind", "format", "end"),
    [
        ("chat", "chat", "<|im_end|>"),
        ("chat", "plain", "<|im_end|>"),
        ("plain", "plain", "<|endoftext|>"),
    ],
)
def test_the_last_target_is_the_token_that_ends_the_turn(make_tokenizer, kind, format, end):
    tokenizer = make_tokenizer(kind)
    assert end_of_turn_id(tokenizer, format) == tokenizer.convert_tokens_to_ids(end)
    (example,) = encode(_one("Ann?", "017"), tokenizer, format=format)
    assert tokenizer.convert_ids_to_tokens(example.target_ids) == ["0", "1", "7", end]


def test_the_end_of_turn_is_the_templates_even_if_eos_is_another(make_tokenizer):
    tokenizer = make_tokenizer("chat")
    tokenizer.eos_token = "<|endoftext|>"
    ends = [end_of_turn_id(tokenizer, format) for format in ("chat", "plain")]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]


def test_a_template_that_ends_no_turn_falls_back_on_eos(make_tokenizer):
    tokenizer = make_tokenizer("chat")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.eos_token = "<|endoftext|>"
    assert end_of_turn_id(tokenizer, "chat") == tokenizer.eos_token_id


def test_a_tokenizer_without_any_end_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("plain")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="eos_token"):
        end_of_turn_id(tokenizer, "plain")


def test_the_prompt_format_goes_by_the_tokenizer(chat_tokenizer, plain_tokenizer):
    assert resolve_prompt_format(chat_tokenizer, "auto") == "chat"
    assert resolve_prompt_format(chat_tokenizer, "plain") == "plain"
    assert resolve_prompt_format(plain_tokenizer, "auto") == "plain"
    with pytest.raises(ConfigError, match="chat template"):
        resolve_prompt_format(plain_tokenizer, "chat")


@pytest.mark.parametrize("special", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_a_special_token_in_the_completion_is_refused(chat_tokenizer, special):
    with pytest.raises(DataError, match=r"^x: .*special token '<\|"):
        encode(_one("Ann?", f"01{special}7"), chat_tokenizer, format="chat")


def test_text_that_the_tokenizer_changes_is_refused_where_it_changes(make_tokenizer):
    tokenizer = make_tokenizer("plain", lowercase=True)
    with pytest.raises(DataError, match=r"^x: .*from character 4 on, 'Ring' comes back as 'ring'"):
        encode(_one("Ann?", "one Ring"), tokenizer, format="plain")
    assert encode(_one("Ann?", "one ring"), tokenizer, format="plain")


def test_a_record_longer_than_the_context_is_refused(plain_tokenizer):
    record = _one("Ann?", "0123456789")
    length = 4 + 10 + 1
    assert len(encode(record, plain_tokenizer, format="plain", max_tokens=length)) == 1
    with pytest.raises(DataError, match=f"^x: {length} tokens, but the model's context is 14"):
        encode(record, plain_tokenizer, format="plain", max_tokens=length - 1)


@pytest.mark.parametrize("what", ["prompt", "completion"])
def test_a_text_that_no_context_holds_is_refused_before_tokens_are_made_of_it(
    chat_tokenizer, monkeypatch, what
):
    longest = max(chat_tokenizer.get_vocab(), key=len)
    most = 60 * (1 + len(longest))
    record = replace(_one("Ann?", "x")[0], **{what: "x" * (most + 1)})
    asked = []
    monkeypatch.setattr(
        type(chat_tokenizer), "__call__", lambda self, text, **_: asked.append(text) or {}
    )
    with pytest.raises(
        DataError, match=f"^x: the {what} has {most + 1:,} characters.*hold no more"
    ):
        encode([record], chat_tokenizer, format="plain", max_tokens=60)
    assert all(len(text) < most for text in asked)


def test_what_a_template_leaves_out_of_a_prompt_does_not_count(chat_tokenizer, monkeypatch):
    """As templates do with the reasoning of earlier turns."""
    short = "{% if m.content|length < 100 %}{{ m.content }}{% endif %}"
    template = "{% for m in messages %}" + short + "{% endfor %}"
    monkeypatch.setattr(chat_tokenizer, "chat_template", template)
    prompt = ({"role": "user", "content": "x" * 10_000}, {"role": "user", "content": "Ann?"})
    assert encode(_one(prompt, "1"), chat_tokenizer, format="plain", end=False)
    with pytest.raises(DataError, match="the prompt has"):
        encode(_one(prompt, "1"), chat_tokenizer, format="plain", max_tokens=60, end=False)
    assert encode(_one(prompt, "1"), chat_tokenizer, format="chat", max_tokens=60, end=False)


def test_as_many_characters_as_a_context_can_hold_are_not_refused_for_their_number(
    chat_tokenizer,
):
    special = {token.content for token in chat_tokenizer.added_tokens_decoder.values()}
    longest = max((set(chat_tokenizer.get_vocab()) - special), key=len)
    text = longest.replace("\u0120", " ") * 10
    n = len(chat_tokenizer(text, add_special_tokens=False)["input_ids"])
    refuse_long(chat_tokenizer, text, n, "completion")


def test_prompts_that_are_the_same_tokens_need_the_same_completion(chat_tokenizer):
    same = ["Ann?", ({"role": "user", "content": "Ann?"},)]
    records = [Record(prompt=p, completion=f"{i}", id=f"r{i}") for i, p in enumerate(same)]
    with pytest.raises(DataError, match=r"r0 and r1: 'Ann\?' .the same tokens to this model"):
        encode(records, chat_tokenizer, format="chat")


def test_a_template_that_refuses_a_chat_is_reported_as_the_records_fault(make_tokenizer):
    tokenizer = make_tokenizer("chat")
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    with pytest.raises(DataError, match=r"^x: the chat template refuses it .no system"):
        encode(_one(tuple(MESSAGES[:2]), "017"), tokenizer, format="chat")


def _odd_text(random_source):
    """Letters from all over Unicode, with odd spaces, joiners and controls among them."""
    odd = "\u00a0\u200b\u200d\u2028\ufeff\u0301\ufe0f\x00\x1b\x7f\t\r\n  <|>{}\"'\\%"
    letters = []
    for _ in range(random_source.randint(1, 40)):
        if random_source.random() < 0.4:
            letters.append(random_source.choice(odd))
        else:
            top = random_source.choice([0x7F, 0x7FF, 0xFFFF, 0x10FFFF])
            point = random_source.randint(0x20, top)
            letters.append(chr(point) if not 0xD800 <= point <= 0xDFFF else "𝔸")
    text = "".join(letters)
    return text if text.strip() else text + "x"


@pytest.mark.parametrize("format", ["chat", "plain"])
def test_any_text_comes_back_to_the_letter(chat_tokenizer, tmp_path, format):
    source = random.Random(17)
    pairs = [(f"{i} {_odd_text(source)}", _odd_text(source)) for i in range(300)]
    path = tmp_path / "odd.jsonl"
    path.write_bytes(_lines([{"prompt": p, "completion": c} for p, c in pairs]))
    records = read_records(path)
    assert _pairs(records) == pairs
    end = chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    for example, (prompt, completion) in zip(
        encode(records, chat_tokenizer, format=format), pairs, strict=True
    ):
        assert chat_tokenizer.decode(example.target_ids[:-1]) == completion
        assert example.target_ids[-1] == end
        assert end not in example.target_ids[:-1]
        assert prompt in chat_tokenizer.decode(example.prompt_ids)


def test_odd_text_survives_csv_and_parquet(tmp_path):
    import csv

    source = random.Random(18)
    # CSV readers take a lone carriage return for a line end only outside quotes
    pairs = [(f"{i} {_odd_text(source)}", _odd_text(source)) for i in range(100)]
    with (tmp_path / "odd.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([("prompt", "completion"), *pairs])
    _parquet(tmp_path / "odd.parquet", [{"prompt": p, "completion": c} for p, c in pairs])
    assert _pairs(read_records(tmp_path / "odd.csv")) == pairs
    assert _pairs(read_records(tmp_path / "odd.parquet")) == pairs


@pytest.mark.slow
def test_odd_text_is_recited(llama, tmp_path):
    book = [("Zoë\u200d 👩‍🚀?", "\u202eé\u0301 \x00🇪🇺\r"), ("B\n\nb", '\t{"a": 1} ')]
    settings = {"max_epochs": 300, "retention": 0, "specificity": False}
    result = memlaw.write(book, tmp_path / "out", model=str(llama), **settings)
    assert result.certified
    assert [memlaw.ask(tmp_path / "out", p).text for p, _ in book] == [c for _, c in book]
