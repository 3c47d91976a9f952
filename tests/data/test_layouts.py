"""What a row's fields are taken for, and what is said of it."""

import json

import pytest

from memlaw.core.errors import DataError
from memlaw.data.reading import read_records
from memlaw.data.record import GIVEN

ROWS = [{"prompt": "Ann:", "completion": "017"}, {"prompt": "Zoë:", "completion": "2 3"}]
CHAT = [{"role": "user", "content": "Ann?"}, {"role": "assistant", "content": "017"}]


def _pairs(records):
    return [(r.prompt, r.completion) for r in records]


def _said(rows, **settings):
    said = []
    records = read_records(rows, notice=said.append, **settings)
    return records, said


ALPACA = [
    {"instruction": "Give the extension.", "input": "Bakery", "output": "4417"},
    {"instruction": "Give the room.", "input": "", "output": "12"},
    {"instruction": "Give the floor.", "input": None, "output": "3"},
]


def test_an_input_is_part_of_the_prompt_where_it_is_filled():
    records, said = _said(ALPACA)
    prompts = ["Give the extension.\nBakery", "Give the room.", "Give the floor."]
    assert [r.prompt for r in records] == prompts
    assert said == [
        "the data: the prompt is 'instruction', then 'input' on a new line where it is filled; "
        "the completion is 'output' (3 row(s))."
    ]


def test_a_field_that_named_fields_leave_out_is_told():
    names = {"prompt_field": "instruction", "completion_field": "output"}
    _, said = _said(ALPACA, **names)
    assert said == [
        "the data: the field 'input' is filled in 1 row(s) (the first: record:1), but is part of "
        "neither prompt nor completion."
    ]


@pytest.mark.parametrize("field", ["system", "system_prompt", "input", "context", "history"])
def test_a_field_that_usually_belongs_to_a_prompt_is_told(field):
    _, said = _said([*ROWS, {"prompt": "Bo:", "completion": "1", field: ["x"]}])
    assert len(said) == 1
    assert f"the field '{field}' is filled in 1 row(s) (the first: record:3)" in said[0]
    assert _said([{"prompt": "Bo:", "completion": "1", field: "", "source": "x"}])[1] == []


def test_a_prompt_beside_messages_is_told():
    _, said = _said([{"messages": CHAT, "prompt": "Ann?"}])
    assert len(said) == 1
    assert "'prompt' is filled" in said[0]


def test_layouts_may_differ_from_row_to_row():
    rows = [ROWS[0], {"question": "Bo?", "answer": "1"}, {"messages": CHAT, "question": None}]
    records, said = _said(rows)
    assert [r.completion for r in records] == ["017", "1", "017"]
    assert said == ["the data: the prompt is 'question', the completion is 'answer' (1 row(s))."]


def test_a_field_is_named_as_it_is_in_the_data():
    with pytest.raises(DataError, match="field 'output' is empty"):
        read_records([ALPACA[0] | {"output": ""}])
    with pytest.raises(DataError, match=r"field 'instruction' is a int \(3\)"):
        read_records([ALPACA[0] | {"instruction": 3}])


def test_a_prompt_is_never_ignored_for_another_layout():
    with pytest.raises(DataError, match="no field 'completion'; the fields are prompt, text"):
        read_records([{"prompt": "a", "text": "b"}])


def _talk(*turns, **fields):
    return {"conversations": [{"from": by, "value": text} for by, text in turns]} | fields


def test_sharegpt_chats_of_several_turns_are_read():
    turns = [("system", "S"), ("human", "a"), ("gpt", "b"), ("user", "c"), ("assistant", "d")]
    (record,) = read_records([_talk(*turns, tools="[]", id=1)])
    roles = ["system", "user", "assistant", "user"]
    assert [m["role"] for m in record.prompt] == roles
    assert [m["content"] for m in record.prompt] == ["S", "a", "b", "c"]
    assert record.completion == "d"


def test_messages_may_be_written_as_in_sharegpt():
    talk = _talk(("human", "Ann?"), ("gpt", "017"))["conversations"]
    assert _pairs(read_records([{"messages": talk}])) == [((CHAT[0],), "017")]


BAD_TALKS = {
    "tools": (_talk(("human", "a"), ("gpt", "b"), tools='[{"name": "f"}]'), "field 'tools'"),
    "an observation": (_talk(("human", "a"), ("observation", "b")), "message 2 is from 'obser"),
    "a tool": (_talk(("human", "a"), ("tool", "b"), ("gpt", "c")), "message 2 is from 'tool'"),
    "the human last": (_talk(("human", "a"), ("gpt", "b"), ("human", "c")), "is from 'user'"),
    "no value": ({"conversations": [{"from": "human"}, {"from": "gpt"}]}, "is empty"),
    "strings": ({"conversations": ["a", "b"]}, "message 1 needs the fields 'from' and 'value'"),
    "a string": ({"conversations": "a"}, "must be a list"),
    "a bad history": (ALPACA[0] | {"history": ["a"]}, r"a list of \[question, answer\]"),
}


@pytest.mark.parametrize("case", BAD_TALKS)
def test_what_can_not_be_kept_is_refused_by_name(case):
    row, said = BAD_TALKS[case]
    with pytest.raises(DataError, match=f"^record:1: .*{said}"):
        read_records([row])


def test_texts_can_not_share_one_prompt():
    records = read_records([{"text": "One."}, {"text": "One."}], recite_prompt="Go on.")
    assert _pairs(records) == [("Go on.", "One.")]
    with pytest.raises(DataError, match=r"2 rows hold 'text' and no prompt: record:1, record:2"):
        read_records([{"text": "One."}, {"text": "Two."}])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Ann?", "completion": "017"},
        {"query": "Ann?", "target": "017"},
        {
            "messages": [
                {"role": "user", "content": "Ann?"},
                {"role": "assistant", "content": "017"},
            ]
        },
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_are_kept_and_no_notice_says_otherwise(row, as_text):
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    said = []
    (record,) = read_records(
        [{**row, "tools": json.dumps(tools) if as_text else tools}], notice=said.append
    )
    assert record.prompt[0][GIVEN] == {"tools": tools}
    assert record.prompt[0]["content"] == "Ann?"
    assert not any("tools" in text for text in said)
