"""Files of prompts."""

import json

import pytest

from memlaw.core.errors import DataError
from memlaw.data.prompts import read_prompts


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    path = tmp_path / "near.txt"
    path.write_text("Ann Becerra:\n\n  Zoë Lund: \nAnn Becerra:\n", encoding="utf-8")
    assert read_prompts(path) == ["Ann Becerra:", "Zoë Lund:"]


def test_jsonl_has_prompts_or_conversations(tmp_path):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ann?"}]
    rows = [{"prompt": "Ann?"}, {"messages": talk}, {"prompt": talk}, {"prompt": "Ann?"}]
    path = tmp_path / "near.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_prompts(path) == ["Ann?", tuple(talk)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": " "},
        {"prompt": 7},
        {"question": "Ann?"},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": None, "content": "Ann?"}]},
        {"messages": [{"role": 7, "content": "Ann?"}]},
        {"messages": [{"role": "assistant", "content": "Ann."}]},
    ],
)
def test_a_row_without_a_prompt_is_named(tmp_path, row):
    path = tmp_path / "near.jsonl"
    path.write_text(json.dumps({"prompt": "Li?"}) + "\n" + json.dumps(row), encoding="utf-8")
    said = r"near\.jsonl:2: (no prompt|message 1 (needs|is from (None|7)))"
    with pytest.raises(DataError, match=said):
        read_prompts(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.txt does not exist"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_a_prompt_is_refused(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="has no prompt"):
        read_prompts(path)
