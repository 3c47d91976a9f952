"""An update of a folder that was written with specificity: held, gated, and certified likewise."""

import json

import pytest

import memlaw

EASY = {"retention": 3.0, "max_epochs": 300, "dtype": "float32", "rank": 32}
ADDED = ("Bo Ek:", "271828")


@pytest.mark.slow
def test_a_held_folder_is_updated(llama, phone_book, texts, tmp_path):
    out = tmp_path / "out"
    assert memlaw.write(phone_book, out, model=str(llama), **EASY, **texts).certified
    data = [*phone_book[1:], ADDED]
    result = memlaw.update(out, data)
    assert result.taken
    assert result.forgotten[0].holds
    assert set(result.written.harms) == {"damage", "prose", "chats", "elsewhere", "near_misses"}
    assert memlaw.diff(out, data).nothing
    assert memlaw.ask(out, ADDED[0]).text == ADDED[1]
    _, second = json.loads((out / "run.json").read_text())["generations"]
    assert second["removed"] == 1
    assert second["specific"] is not None
