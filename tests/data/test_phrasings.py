"""Several phrasings of one record: which are trained, which are held out, what is refused."""

import json

import pytest

from memlaw.core.errors import DataError
from memlaw.data.reading import read_records


def _rows(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("n", "trained"), [(1, 1), (2, 1), (3, 2), (7, 6), (8, 6), (12, 9)])
def test_a_quarter_of_the_phrasings_is_held_out_and_one_at_least(n, trained):
    prompts = [f"Ask {i}:" for i in range(n)]
    records = read_records([{"prompts": prompts, "completion": "017"}])
    assert [record.prompt for record in records] == prompts[:trained]
    assert records[0].held_out == tuple(prompts[trained:])
    assert {record.completion for record in records} == {"017"}
    assert len({record.id for record in records}) == trained
    assert not any(record.held_out for record in records[1:])


def test_a_phrasing_may_be_messages_and_counts_once():
    chat = [{"role": "user", "content": "Ann?"}]
    rows = [{"prompts": ["Ann:", chat, "Ann:"], "completion": "017"}]
    (record,) = read_records(rows)
    assert record.prompt == "Ann:"
    assert record.held_out == (tuple(chat),)


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([], "field 'prompts' is missing or empty"),
        ("Ann:", "field 'prompts' is a str"),
        (["Ann:", 3], "'prompts[2]'"),
        (["Ann:", " "], "'prompts[2]'"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(prompts, says):
    with pytest.raises(DataError) as caught:
        read_records([{"prompts": prompts, "completion": "017"}])
    assert says in str(caught.value)


def test_what_is_trained_elsewhere_is_not_held_out():
    one = {"prompts": ["Ann:", "Ann?"], "completion": "017"}
    records = read_records([one, {"prompt": "Ann?", "completion": "017"}])
    assert [record.held_out for record in records] == [(), ()]
    with pytest.raises(DataError, match="different completions"):
        read_records([one, {"prompt": "Ann?", "completion": "018"}])


def test_paraphrases_of_a_file_join_the_records(tmp_path):
    data = [("Ann:", "017"), ("Bo:", "018")]
    row = {"prompt": "Ann:", "paraphrases": ["Ann's extension:", "Where do I reach Ann?"]}
    records = read_records(data, paraphrases=_rows(tmp_path / "p.jsonl", row))
    assert [(record.prompt, record.held_out) for record in records] == [
        ("Ann:", ("Where do I reach Ann?",)),
        ("Ann's extension:", ()),
        ("Bo:", ()),
    ]


def test_two_rows_for_one_prompt_both_count(tmp_path):
    rows = [{"prompt": "Ann:", "paraphrases": [text]} for text in ("Ann?", "And Ann?")]
    records = read_records([("Ann:", "017")], paraphrases=_rows(tmp_path / "p.jsonl", *rows))
    assert [(r.prompt, r.held_out) for r in records] == [("Ann:", ("And Ann?",)), ("Ann?", ())]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "Cy:", "paraphrases": ["Cy?"]}, "no record has this prompt"),
        ({"prompt": "Ann:"}, "field 'paraphrases' is missing or empty"),
        ({"paraphrases": ["Ann?"]}, "'prompt[1]'"),
    ],
)
def test_paraphrases_that_fit_nothing_are_refused(tmp_path, row, says):
    with pytest.raises(DataError) as caught:
        read_records([("Ann:", "017")], paraphrases=_rows(tmp_path / "p.jsonl", row))
    assert says in str(caught.value)
    assert "p.jsonl:1" in str(caught.value)


def test_a_file_of_paraphrases_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_records([("Ann:", "017")], paraphrases=tmp_path / "none.jsonl")
