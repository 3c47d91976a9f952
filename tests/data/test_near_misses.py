"""Near misses: like the records' prompts, and none of them."""

import random
import re
from collections import Counter

import pytest

from memlaw.data.near_misses import KINDS, NOT_STORED, near_misses, words_of

FIRST = ("Jerry", "Ann", "Li", "Zoë", "Per", "Omar", "Tess", "Ivo", "Ruth", "Kai", "Mona", "Abe")
LAST = (
    *("Becerra", "Oyelaran", "Castellane", "Müller", "Lund", "Haddock", "Quayle", "Brankov"),
    *("Goldwyn", "Tanager", "Ferris", "Wexford"),
)
BOOK = [f"{first} {last}:" for first, last in zip(FIRST, LAST, strict=True)]


def _plain(text):
    return " ".join(text.split()).casefold()


def test_each_kind_has_its_share_and_none_is_a_records():
    found = near_misses(BOOK, 200, seed=3)
    assert len(found) == 200
    counts = Counter(near.kind for near in found)
    assert counts["recombined"] == counts["unknown"] == 80
    assert set(counts) == set(KINDS)
    assert len({near.prompt for near in found}) == 200
    records = {_plain(prompt) for prompt in BOOK}
    for near in found:
        assert near.prompt not in BOOK
        assert (_plain(near.prompt) in records) == (near.kind == "case")


def test_what_is_recombined_has_the_first_word_of_one_and_the_last_of_another():
    for near in near_misses(BOOK, 60, seed=0, kinds={"recombined": 1}):
        first, last = near.prompt.removesuffix(":").split()
        assert FIRST.index(first) != LAST.index(last)


def test_what_is_unknown_shares_no_word_with_the_records():
    found = near_misses(BOOK, 100, seed=0, kinds={"unknown": 1})
    assert len(found) == 100
    known = words_of(BOOK)
    for near in found:
        assert re.fullmatch(r"\w\S* \w\S*:", near.prompt)
        assert not known & words_of([near.prompt])


def test_the_wrongly_written_kinds_are_what_they_are_called():
    words = {kind: near_misses(BOOK, 8, seed=1, kinds={kind: 1}) for kind in KINDS}
    for near in words["dropped"]:
        assert near.prompt.removesuffix(":") in FIRST + LAST
    for near in words["swapped"]:
        last, first = near.prompt.removesuffix(":").split()
        assert f"{first} {last}:" in BOOK
    for near in words["misspelt"]:
        assert sum(word in words_of(BOOK) for word in words_of([near.prompt])) == 1


def test_the_same_request_gives_the_same_whatever_the_order_and_none_that_is_to_be_avoided():
    shuffled = random.Random(0).sample(BOOK, len(BOOK))
    first = near_misses(BOOK, 90, seed=5)
    assert near_misses(shuffled, 90, seed=5) == first
    second = near_misses(BOOK, 90, seed=5, avoid={near.prompt for near in first})
    assert len(second) == 90
    assert not {near.prompt for near in first} & {near.prompt for near in second}
    assert near_misses(BOOK, 90, seed=6) != first


def test_of_a_conversation_the_last_user_message_is_changed():
    def conversation(name):
        return (
            {"role": "system", "content": "You know everybody."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Who?"},
            {"role": "user", "content": name},
        )

    talks = [conversation(name) for name in BOOK]
    found = near_misses(talks, 50, seed=0)
    assert len(found) == 50
    for near in found:
        *before, last = near.prompt
        assert tuple(before) == talks[0][:3]
        assert last["role"] == "user"
        assert near.prompt not in talks


def test_questions_of_one_frame_keep_it():
    questions = [f"What is the number of {name.removesuffix(':')}, please?" for name in BOOK]
    for near in near_misses(questions, 60, seed=0, kinds=dict.fromkeys(NOT_STORED, 1)):
        assert re.fullmatch(r"What is the number of \w\S* \w\S*, please\?", near.prompt)


def test_numbers_make_numbers():
    draw = random.Random(0)
    numbers = [f"{draw.randrange(10**6):06}" for _ in range(50)]
    found = near_misses(numbers, 60, seed=0)
    assert len(found) == 60
    assert all(near.prompt.isdigit() for near in found)
    assert {near.kind for near in found} >= set(NOT_STORED)


@pytest.mark.parametrize(
    "prompts",
    [
        [""],
        [" ", "\n"],
        ["a"],
        ["😀"],
        ["😀 🎉", "🎉 😀"],
        ["?"],
        ["door"],
        ["7"],
        ["00", "11"],
        ["你好"],
        ["Recite the text."],
        ["x" * 300, "é́", "ǅ"],
        [({"role": "assistant", "content": "hm"},)],
    ],
)
def test_strange_prompts_give_what_can_be_made(prompts):
    found = near_misses(prompts, 50, seed=0)
    assert len(found) <= 50
    assert not {str(near.prompt) for near in found} & {str(prompt) for prompt in prompts}
    assert all(str(near.prompt).strip() for near in found)


def test_any_prompts_give_distinct_ones_in_the_end():
    draw = random.Random(1)
    letters = " \t'-:aAbéß1٣你😀‍İ"
    for _ in range(150):
        prompts = [
            "".join(draw.choices(letters, k=draw.randrange(9))) for _ in range(draw.randrange(1, 5))
        ]
        found = near_misses(prompts, 20, seed=draw.randrange(9))
        assert len({near.prompt for near in found}) == len(found)
        known = {_plain(prompt) for prompt in prompts}
        assert not any(near.prompt in prompts for near in found)
        assert not any(_plain(near.prompt) in known for near in found if near.kind != "case")
