"""The probe's tasks: seeded, nested, and as noisy as was asked."""

import pytest

from memlaw.core.errors import ConfigError, DataError
from memlaw.data.encoding import special_ids
from memlaw.data.tasks import parse_task, phone_book, task_examples
from memlaw.data.texts import natural_prose


def _ids(tokenizer, task, n_tokens, seed=0, **settings):
    examples = task_examples(parse_task(task), tokenizer, n_tokens, seed, format="chat", **settings)
    return [e.target_ids for e in examples]


@pytest.mark.parametrize("task", ["phonebook", "noise", "noise:0.4", "noise:0"])
def test_the_same_seed_gives_the_same_data_and_another_one_others(chat_tokenizer, task):
    assert _ids(chat_tokenizer, task, 60) == _ids(chat_tokenizer, task, 60)
    assert _ids(chat_tokenizer, task, 60) != _ids(chat_tokenizer, task, 60, seed=1)


def test_a_smaller_phone_book_is_the_beginning_of_a_larger_one(chat_tokenizer):
    small, large = _ids(chat_tokenizer, "phonebook", 33), _ids(chat_tokenizer, "phonebook", 120)
    assert len(small) == 3  # ten digits and an end each
    assert len(large) == 10
    assert large[:3] == small


def test_names_are_distinct_and_numbers_have_ten_digits():
    records = [record for record, _ in zip(phone_book(0), range(5000), strict=False)]
    assert len({r.prompt for r in records}) == 5000
    assert all(len(r.completion) == 10 and r.completion.isdecimal() for r in records)
    digits = "".join(r.completion for r in records)
    assert all(abs(digits.count(d) - 5000) < 400 for d in "0123456789")  # 6 σ


def test_shorter_noise_is_the_beginning_of_longer(chat_tokenizer):
    (short,), (long,) = _ids(chat_tokenizer, "noise:0.5", 50), _ids(chat_tokenizer, "noise:0.5", 90)
    assert len(short) == 50
    assert short[:-1] == long[:49]
    assert short[-1] == long[-1] == chat_tokenizer.eos_token_id


def test_noise_replaces_its_share_and_more_noise_the_same_places_and_more(chat_tokenizer):
    text, some, most, all_ = (
        _ids(chat_tokenizer, f"noise:{ratio}", 3000)[0][:-1] for ratio in (0, 0.2, 0.8, 1)
    )
    for noisy, ratio in ((some, 0.2), (most, 0.8)):
        replaced = sum(a != b for a, b in zip(text, noisy, strict=True)) / len(text)
        assert abs(replaced - ratio) < 0.05
        # what is replaced is replaced by the same token at every ratio
        assert all(n in (t, r) for t, n, r in zip(text, noisy, all_, strict=True))
    assert all(s in (t, m) for t, s, m in zip(text, some, most, strict=True))
    special = special_ids(chat_tokenizer)
    assert not set(all_) & special
    assert len(set(all_)) == len(chat_tokenizer) - len(special)


def test_the_natural_text_is_prose_that_neither_retention_nor_damage_uses():
    from memlaw.data.texts import retained_text, unseen_text

    paragraphs = natural_prose().split("\n\n")
    assert len(natural_prose()) > 100_000
    other = " ".join((retained_text() + " " + unseen_text()[0]).split())
    assert sum(paragraph in other for paragraph in paragraphs) < 0.01 * len(paragraphs)


def test_files_give_text_and_records(chat_tokenizer, tmp_path, phone_file):
    story = tmp_path / "story.txt"
    story.write_text("Once upon a time there was a model that forgot nothing.", encoding="utf-8")
    (ids,) = _ids(chat_tokenizer, f"text:{story}", 12)
    assert (
        chat_tokenizer.decode(ids[:-1]) == story.read_text()[: len(chat_tokenizer.decode(ids[:-1]))]
    )
    assert _ids(chat_tokenizer, f"text:{story}", 12, seed=5) == [ids]
    assert len(_ids(chat_tokenizer, f"records:{phone_file}", 14)) == 2
    (noisy,) = _ids(chat_tokenizer, "noise:0", 12, natural_text=story)
    start = chat_tokenizer.decode(noisy[:3])
    assert start in story.read_text() * 2


@pytest.mark.parametrize("fields", [("query", "target"), ("question", "matching")])
def test_the_published_files_are_read_as_they_are(chat_tokenizer, tmp_path, fields):
    path = tmp_path / "published.jsonl"
    path.write_text(f'{{"{fields[0]}": "A B:", "{fields[1]}": "12"}}\n', encoding="utf-8")
    (ids,) = _ids(chat_tokenizer, f"records:{path}", 3)
    assert chat_tokenizer.decode(ids[:-1]) == "12"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("noise:2", "number from 0 to 1"),
        ("noise:lots", "number from 0 to 1"),
        ("poem", "no task 'poem'. There are phonebook"),
        ("text:", "no task 'text:'"),
        ("phonebook:7", "no task"),
    ],
)
def test_a_task_that_there_is_not(task, message):
    with pytest.raises(ConfigError, match=message):
        parse_task(task)


def test_too_much_is_asked_for(chat_tokenizer, tmp_path, phone_file):
    story = tmp_path / "story.txt"
    story.write_text("Short.", encoding="utf-8")
    with pytest.raises(DataError, match=r"story.txt has .* tokens, 99 are asked for"):
        _ids(chat_tokenizer, f"text:{story}", 100)
    with pytest.raises(DataError, match=r"holds 28 target tokens, 100 are asked for"):
        _ids(chat_tokenizer, f"records:{phone_file}", 100)
    with pytest.raises(DataError, match=r"context is 64. Probe smaller lengths"):
        _ids(chat_tokenizer, "noise", 60, max_tokens=64)
