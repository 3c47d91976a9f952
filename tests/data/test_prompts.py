"""Prompts that come with the package or from a file."""

import pytest

from memlaw.core.errors import DataError
from memlaw.data.conversations import training_conversations
from memlaw.data.everyday import everyday
from memlaw.data.prompts import read_prompts


def _said(prompt):
    """The last turn, which may be the same in no other conversation."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return " ".join(text.casefold().split())


def test_what_is_trained_on_is_not_what_is_measured_on():
    trained, measured = ([_said(p) for p in ps] for ps in (training_conversations(), everyday()))
    assert not set(trained) & set(measured)


def test_there_are_many_conversations_of_every_kind():
    found = training_conversations()
    chats = [prompt for prompt in found if not isinstance(prompt, str)]
    assert len(found) >= 400
    assert len({repr(prompt) for prompt in found}) == len(found)
    assert all(chat[-1]["role"] == "user" for chat in chats)
    assert sum(chat[0]["role"] == "system" for chat in chats) >= 20
    assert sum(len(chat) >= 3 for chat in chats) >= 20


def test_prompts_are_lines_of_a_text(tmp_path):
    path = tmp_path / "keep.txt"
    path.write_text("\ufeffWho are you?\n\n  Hi \n", encoding="utf-8")
    assert read_prompts(path) == ["Who are you?", "Hi"]


def test_prompts_are_fields_of_jsonl(tmp_path):
    path = tmp_path / "keep.jsonl"
    user = {"role": "user", "content": "Hi"}
    path.write_text(
        '{"prompt": "Who are you?"}\n'
        '{"prompt": [{"role": "user", "content": "Hi"}]}\n'
        '{"messages": [{"role": "user", "content": "Hi"}, '
        '{"role": "assistant", "content": "Yes?"}]}\n',
        encoding="utf-8",
    )
    assert read_prompts(path) == ["Who are you?", (user,), (user,)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "\n \n", "has no prompts"),
        ("a.jsonl", '{"prompt": "Hi"}\n{"text": "Hi"}\n', "a.jsonl:2: no prompt there"),
        ("a.jsonl", "Hi\n", "a.jsonl:1: no prompt there"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "Hi"}]}\n', "no prompt there"),
        ("a.jsonl", "[]\n", "no prompt there"),
        ("a.txt", None, "can't be read"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read_prompts(path)
