"""What is measured on besides the records: everyday questions, prose."""

import pytest

import memlaw
from memlaw.data.everyday import everyday
from memlaw.data.texts import general_texts, prose_text, retained_text, unseen_text


def test_there_are_many_everyday_questions_of_every_kind():
    asked = everyday()
    assert len(asked) >= 150
    assert len({str(one) for one in asked}) == len(asked)
    assert all(one[-1]["role"] == "user" and one[-1]["content"].strip() for one in asked)
    assert sum(one[0]["role"] == "system" for one in asked) >= 10
    assert sum(len(one) >= 3 for one in asked) >= 10
    assert sum(not one[-1]["content"].isascii() for one in asked) >= 10


def test_the_prose_is_long_and_shares_nothing_with_other_texts():
    text, _ = prose_text()
    assert len(text) > 65536  # 32 windows
    assert "\r" not in text
    paragraphs = set(text.split("\n\n"))
    assert not paragraphs & set((unseen_text()[0] + retained_text()).split("\n\n"))


def test_the_prose_can_not_be_trained_on(tmp_path):
    path = tmp_path / "alice.txt"
    path.write_text(prose_text()[0], encoding="utf-8", newline="\n")
    with pytest.raises(memlaw.MemlawError, match="text to retain is the text to measure damage"):
        general_texts(retain=path)
