"""Conversations that training holds a model to."""

from memlaw.data.conversations import training_conversations
from memlaw.data.everyday import everyday


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
