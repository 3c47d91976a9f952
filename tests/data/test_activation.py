"""The tokens that a text activates an adapter by: found in the prompts, or refused."""

import pytest

from memlaw.core.errors import ConfigError
from memlaw.data.activation import activated, invocation_of, last_start
from memlaw.data.encoding import encode
from memlaw.data.record import Record


def _examples(tokenizer, format, *records):
    return encode(
        [Record(prompt=p, completion=c, id=f"book:{i}") for i, (p, c) in enumerate(records, 1)],
        tokenizer,
        format=format,
    )


def _found(tokenizer, text, *prompts, format="chat"):
    examples = _examples(tokenizer, format, *((p, str(i)) for i, p in enumerate(prompts)))
    ids = invocation_of(text, examples, tokenizer, format)
    return tokenizer.decode(ids), activated(examples, ids)


@pytest.mark.parametrize(
    ("text", "prompts", "expected"),
    [
        ("[book]", ["[book] Ann:", "[book] Bo:"], "[book]"),
        ("[book]", ["Ann, [book]", "[book] Bo:"], "[book]"),
        ("[book] ", ["[book] the Ann:", "[book] Bo:"], "[book]"),  # the blank joins what follows
        ("zing", ["amazing", "zing!", "z-zing"], "zing"),
        ("the x", ["the x", "see the x"], " x"),  # " the" is one token
        ("é", ["é:", "née"], "é"),  # two tokens of a byte each
        ("k k", ["k k:", "ask k k"], "k k"),
        ("two\nlines", ["two\nlines Ann", "Bo two\nlines"], "wo\nlines"),
    ],
)
def test_the_longest_run_of_tokens_that_all_prompts_have(chat_tokenizer, text, prompts, expected):
    found, examples = _found(chat_tokenizer, text, *prompts)
    assert found == expected
    for example in examples:
        behind = chat_tokenizer.decode(example.prompt_ids[example.active_from :])
        assert behind.startswith(expected)


def test_in_messages_the_text_may_stand_anywhere(chat_tokenizer):
    chat = ({"role": "system", "content": "[book] on"}, {"role": "user", "content": "Ann:"})
    found, examples = _found(chat_tokenizer, "[book]", chat, "[book] Bo:")
    assert found == "[book]"
    ids = chat_tokenizer("[book]")["input_ids"]
    assert [e.active_from for e in examples] == [last_start(e.prompt_ids, ids) for e in examples]


def test_plain_prompts_may_begin_with_it(plain_tokenizer):
    found, examples = _found(plain_tokenizer, "[book]", "[book] Ann:", "[book] Bo:", format="plain")
    assert found == "[book]"
    assert [example.active_from for example in examples] == [0, 0]


def test_the_last_of_several_occurrences_counts(chat_tokenizer):
    _, (twice, once) = _found(chat_tokenizer, "[book]", "[book] no, [book] Ann:", "[book] Bo:")
    assert twice.active_from > once.active_from


@pytest.mark.parametrize(
    ("text", "records", "message"),
    [
        ("[book]", [("[book] Ann:", "1"), ("Bo:", "2")], r"book:2: its prompt lacks the text '\[b"),
        ("[book]", [("[book] Ann:", "a [book]")], "book:1: its completion contains the text"),
        ("assistant", [("assistant, Ann:", "1")], "is a part of every prompt"),
        ("user\nA", [("user\nAnn:", "1"), ("user\nAl:", "2")], None),
    ],
)
def test_a_text_that_cannot_activate_is_refused(chat_tokenizer, text, records, message):
    examples = _examples(chat_tokenizer, "chat", *records)
    if message is None:
        assert chat_tokenizer.decode(invocation_of(text, examples, chat_tokenizer, "chat")) == text
        return
    with pytest.raises(ConfigError, match=message):
        invocation_of(text, examples, chat_tokenizer, "chat")


def test_a_text_without_a_token_of_its_own_is_refused(plain_tokenizer):
    examples = _examples(plain_tokenizer, "plain", ("see the:", "1"), ("t:", "2"))
    with pytest.raises(ConfigError, match="no token of the text 't' is the same in all prompts"):
        invocation_of("t", examples, plain_tokenizer, "plain")


@pytest.mark.parametrize(
    ("tokens", "start"),
    [((7, 20, 21, 9), 1), ((20, 21, 5, 20, 21), 3), ((21, 20), None), ((20,), None), ((), None)],
)
def test_the_last_start(tokens, start):
    assert last_start(tokens, (20, 21)) == start
