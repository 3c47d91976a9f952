"""Which prompts are held to the bare model: none of the records', none that is measured on."""

import dataclasses

import pytest

from memlaw.core.errors import ConfigError
from memlaw.data.encoding import encode, encode_prompt, resolve_prompt_format
from memlaw.data.everyday import everyday
from memlaw.data.record import Example, Record
from memlaw.data.texts import GeneralTexts
from memlaw.measure import own_prompts
from memlaw.measure.domains import Chats
from memlaw.measure.elsewhere import Elsewhere
from memlaw.measure.harm import measured_on
from memlaw.measure.own_prompts import greedy_answers
from memlaw.measure.subject import Subject
from memlaw.model.base import load_model
from memlaw.settings.recipe import RECIPE
from memlaw.train import domains
from memlaw.train.negatives import make_negatives, mixed

SMALL = dataclasses.replace(RECIPE, pool=60, own_chats=8, everyday_chats=30, answer_tokens=4)
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(params=["llama", "gpt2"])
def base(request, make_model):
    """A model with a chat template, and one without."""
    return load_model(make_model(request.param), dtype="float32")


def _records(base, book):
    records = [Record(prompt=p, completion=c, id=f"r{i}") for i, (p, c) in enumerate(book)]
    format = resolve_prompt_format(base.tokenizer, "auto")
    return encode(records, base.tokenizer, format=format), format


def _subject(base, records, format):
    return Subject(
        base=base,
        texts=GeneralTexts(retained="", unseen="", unseen_name=""),
        records=[example.record for example in records],
        format=format,
    )


def _made(base, book, recipe=SMALL, **how):
    records, format = _records(base, book)
    return make_negatives(_subject(base, records, format), records, recipe=recipe, **how)


def test_none_is_a_record_or_there_twice(base, phone_book):
    everyday = dataclasses.replace(SMALL, everyday_chats=1000)  # hi is one of them
    found = _made(base, [*phone_book, ("hi", "to everybody")], everyday)
    records, _ = _records(base, [*phone_book, ("hi", "to everybody")])
    prompts = [example.prompt_ids for example in found.examples]
    assert len(found.near) == 60
    assert len(found.chats) > 30
    assert len(set(prompts)) == len(prompts)
    assert not {record.prompt_ids for record in records} & set(prompts)


def test_near_misses_end_where_the_answer_begins_and_chats_in_the_base_models_answer(
    base, phone_book
):
    found = _made(base, phone_book)
    format = resolve_prompt_format(base.tokenizer, "auto")
    assert {len(example.target_ids) for example in found.near} == {1}
    greedy = found.chats[-3:]
    answers = greedy_answers(
        base, [example.record.prompt for example in greedy], format=format, max_tokens=4
    )
    for example, answer in zip(greedy, answers, strict=True):
        assert example.prompt_ids == encode_prompt(base.tokenizer, example.record.prompt, format)
        assert len(answer) == len(example.target_ids)


def test_what_is_measured_on_is_avoided(base, phone_book):
    usual = _made(base, phone_book)
    some = [example.record.prompt for example in (*usual.near[:20], *usual.chats[:20])]
    found = _made(base, phone_book, avoid=some)
    said = {repr(example.record.prompt) for example in found.examples}
    assert not {repr(prompt) for prompt in (*some, *everyday())} & said


def test_training_and_measuring_share_no_prompt(base, phone_book):
    records, format = _records(base, phone_book)
    measured = measured_on(_subject(base, records, format))
    found = _made(base, phone_book, avoid=measured)
    said = {example.prompt_ids for example in found.examples}
    assert len(measured) > 400
    assert len(said) > 80
    assert not {encode_prompt(base.tokenizer, prompt, format) for prompt in measured} & said


def test_those_to_keep_are_always_among_them(base, phone_book):
    keep = ["Who are you?", (SYSTEM, {"role": "user", "content": "Who are you?"})]
    found = _made(base, phone_book, keep=keep)
    assert [example.record.prompt for example in found.kept] == keep
    assert found.examples[-2:] == found.kept
    assert all(example.target_ids for example in found.kept)


def test_a_record_can_not_be_kept_as_it_was(base, phone_book):
    with pytest.raises(ConfigError, match="'Li Na:' is the prompt of a record"):
        _made(base, phone_book, keep=["Li Na:"])


def test_a_prompt_that_fills_the_context_can_not_be_kept(base, phone_book):
    with pytest.raises(ConfigError, match="can't be asked"):
        _made(base, phone_book, keep=["0 " * 255])


def test_a_small_context_has_short_answers_and_no_long_prompts(make_model, phone_book):
    base = load_model(make_model("llama"), dtype="float32")
    base.model.config.max_position_embeddings = 80
    found = _made(base, phone_book, dataclasses.replace(SMALL, answer_tokens=24))
    assert found.near
    assert found.chats
    assert max(len(example.target_ids) for example in found.chats) <= 20
    assert max(len(e.prompt_ids) + len(e.target_ids) for e in found.examples) <= 80


def test_what_a_tokenizer_writes_alike_is_no_near_miss(make_model, make_tokenizer, phone_book):
    base = load_model(make_model("llama"), dtype="float32")
    base = dataclasses.replace(base, tokenizer=make_tokenizer("chat", lowercase=True))
    records, format = _records(base, phone_book)
    recipe = dataclasses.replace(SMALL, kinds={"case": 1.0})
    found = make_negatives(_subject(base, records, format), records, recipe=recipe)
    assert not {e.prompt_ids for e in records} & {e.prompt_ids for e in found.near}


def test_one_record_of_one_word_has_negatives_too(base):
    found = _made(base, [("Password", "7730")])
    assert found.chats
    assert all(example.record.prompt != "Password" for example in found.examples)


@pytest.mark.slow
def test_what_the_embedded_model_says_comes_with_the_package(tmp_path, monkeypatch, phone_book):
    """With an empty cache, nothing has to be decoded that no record has a part in."""
    monkeypatch.setenv("MEMLAW_CACHE", str(tmp_path))
    embedded = load_model("embedded")

    def refuse(*args, **how):
        raise AssertionError("the model was asked")

    for module in (own_prompts, domains):
        monkeypatch.setattr(module, "sample_decode", refuse)
    monkeypatch.setattr(own_prompts, "greedy_decode", refuse)
    records, format = _records(embedded, phone_book)
    subject = _subject(embedded, records, format)
    made = make_negatives(subject, records, recipe=RECIPE, avoid=measured_on(subject))
    assert len(made.chats) > 600
    assert len(domains._own_text(embedded, RECIPE)) == RECIPE.text_windows
    elsewhere = Elsewhere(subject)
    assert len(elsewhere.base_answers) == len(elsewhere.asked) > 300
    assert len(Chats(subject).texts()) == 64
    assert not (tmp_path / "said").exists()


def _example(target):
    return Example(
        record=Record(prompt="", completion="", id="1"), prompt_ids=(1,), target_ids=target
    )


def test_every_second_answer_goes_on_with_what_completions_consist_of():
    records = [_example((10 + i, 20 + i, 30 + i, 9)) for i in range(8)]  # 9 ends them
    chats = [_example((1, 2, 3, 4)) for _ in range(40)]
    found = mixed(chats, records, most=3, seed=0)
    assert found[::2] == chats[::2]
    lengths = set()
    for example in found[1::2]:
        begun = [t for t in example.target_ids if t < 9]
        stored = example.target_ids[len(begun) :]
        assert tuple(begun) == (1, 2, 3, 4)[: len(begun)]
        assert len(begun) <= 3
        assert 1 <= len(stored) <= 3
        assert [t // 10 for t in stored] == [1, 2, 3][: len(stored)]  # each in its place
        lengths.add((len(begun), len(stored)))
    assert len(lengths) > 6
    assert mixed(chats, records, most=3, seed=0) == found


def test_completions_of_one_token_or_none_can_be_mixed_in():
    chats = [_example((1, 2)) for _ in range(6)]
    for targets in ([(9,)], [(5, 9)], [(5, 9), (6, 7, 8, 9)]):
        found = mixed(chats, [_example(t) for t in targets], most=1, seed=0)
        assert all(example.target_ids for example in found)
