"""What a row's fields are taken for, and what is said of it."""

import json

import pytest

from memlaw.core.errors import DataError
from memlaw.data.reading import read_records
from memlaw.data.record import GIVEN, given_of

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


TALK = [{"from": "human", "value": "Ann?"}, {"from": "gpt", "value": "017"}]
AS_MESSAGES = {
    "JSON text": {"messages": json.dumps(CHAT)},
    "JSON text of another kind": {"conversations": json.dumps(TALK)},
    "columns": {"messages": {"role": ["user", "assistant"], "content": ["Ann?", "017"]}},
    "columns of another kind": {
        "conversations": {"from": ["human", "gpt"], "value": ["Ann?", "017"]}
    },
    "a list": CHAT,
    "a list of another kind": TALK,
    "capitals": {
        "conversations": [{"from": "Human", "value": "Ann?"}, {"from": "GPT", "value": "017"}]
    },
    "a text completed": {"prompt": [CHAT[0]], "completion": "017"},
    "a text asked": {"prompt": "Ann?", "completion": [CHAT[1]]},
}


@pytest.mark.parametrize("name", AS_MESSAGES)
def test_messages_are_read_as_people_keep_them(name):
    assert _pairs(read_records([AS_MESSAGES[name]])) == [((CHAT[0],), "017")]


def test_parts_without_a_type_are_texts():
    (record,) = read_records(
        [{"messages": [{"role": "user", "content": [{"text": "Ann?"}]}, CHAT[1]]}]
    )
    assert record.prompt[0]["content"] == [{"type": "text", "text": "Ann?"}]


def test_a_system_message_beside_messages_stands_before_them():
    record = read_records([{"messages": CHAT, "system": "Be brief."}])[0]
    assert record.prompt[0] == {"role": "system", "content": "Be brief."}
    whole = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert read_records([{"messages": whole, "system": "Be brief."}])[0].prompt == record.prompt
    with pytest.raises(DataError, match="'system' is another system message"):
        read_records([{"messages": whole, "system": "Be long."}])


def test_that_only_the_last_answer_is_recited_is_told():
    turns = [{"messages": [*CHAT, {"role": "user", "content": "Bo?"}, CHAT[1]]}, {"messages": CHAT}]
    _, said = _said(turns)
    assert len(said) == 1
    assert said[0].startswith(
        "the data: 1 conversation(s) have several answers (the first: record:1)"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    result = {"role": "tool", "content": "7"}
    assert _said([{"messages": [CHAT[0], call, result, CHAT[1]]}])[1] == []


def test_a_prompt_that_ends_in_the_assistants_words_is_told():
    begun = {"role": "assistant", "content": "It is"}
    _, said = _said([{"prompt": [CHAT[0], begun], "completion": [CHAT[1]]}])
    assert "end in a message of the assistant's (the first: record:1)" in said[-1]


@pytest.mark.parametrize("as_text", [False, True])
def test_a_rows_template_arguments_are_kept(as_text):
    given = {"enable_thinking": False, "other": None}  # tables have null for what others have
    row = {"prompt": "Ann?", "completion": "017"}
    row["chat_template_kwargs"] = json.dumps(given) if as_text else given
    (record,) = read_records([row])
    assert record.prompt[0][GIVEN] == {"chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(DataError, match="'chat_template_kwargs' must be an object"):
        read_records([row | {"chat_template_kwargs": [1]}])


def test_each_phrasing_is_asked_with_what_the_row_gives_the_template():
    given = {"chat_template_kwargs": {"enable_thinking": False}}
    row = {"prompts": ["Ann?", "Ann's?"], "completion": "017"} | given
    (record,) = read_records([row])
    assert [p[0]["content"] for p in (record.prompt, *record.held_out)] == row["prompts"]
    assert [given_of(p) for p in (record.prompt, *record.held_out)] == [given, given]


@pytest.mark.parametrize("mark", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("value", [0, False])
def test_an_answer_that_is_marked_as_not_to_be_learnt_is_refused(mark, value):
    asked, answer = ({"role": r, "content": c} for r, c in (("user", "Ann?"), ("assistant", "017")))
    with pytest.raises(DataError, match=rf"record:1: the answer is marked {mark}: .*take the mark"):
        read_records([{"messages": [asked, answer | {mark: value}]}])
    for other in (1, True, None):
        assert (
            len(read_records([{"messages": [asked | {mark: value}, answer | {mark: other}]}])) == 1
        )


def test_an_answer_that_is_not_wanted_is_refused_unless_fields_are_named():
    row = {"prompt": "Ann?", "completion": "017", "label": False}
    with pytest.raises(DataError, match=r"record:1: 'label' is false.*--completion-field"):
        read_records([row])
    named = {"prompt_field": "prompt", "completion_field": "completion"}
    for rows in (read_records([row | {"label": True}]), read_records([row], **named)):
        assert [record.completion for record in rows] == ["017"]


@pytest.mark.parametrize("field", ["image", "images", "audio"])
def test_media_beside_a_prompt_are_told(field):
    said = []
    read_records([{"prompt": "Ann?", "completion": "017", field: "a.png"}], notice=said.append)
    assert f"'{field}' is filled" in " ".join(said)
