"""What is kept of a base model: timed when it is made, and not when it is found."""

import json

import pytest
import torch

import memlaw
from memlaw.core.first_time import Stopwatch
from memlaw.data.record import Record
from memlaw.data.texts import GeneralTexts
from memlaw.measure.near_prompts import NearMisses
from memlaw.measure.own_prompts import greedy_answers
from memlaw.measure.subject import Subject
from memlaw.model.base import load_model
from memlaw.model.cache import Kept, kept

TENSOR = torch.arange(3.0)


@pytest.fixture(scope="module")
def base(llama):
    return load_model(str(llama))


def _make():
    return Kept([1, (2,)], {"x": TENSOR})


def test_the_first_time_is_timed_and_found_again_it_takes_none(base, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMLAW_CACHE", str(tmp_path))
    first = Stopwatch()
    made = kept(base, "some-thing", {"n": 1}, _make)
    assert 0 < first.once_s <= first.wall_s
    again = Stopwatch()
    found = kept(base, "some-thing", {"n": 1}, lambda: 1 / 0)
    assert again.once_s == 0
    assert found.content == made.content == [1, [2]]
    assert torch.equal(found.tensors["x"], made.tensors["x"])


def test_what_cannot_be_kept_is_made_each_time_and_not_counted(base, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MEMLAW_CACHE", str(tmp_path / "file"))
    watch, made = Stopwatch(), []

    def make():
        made.append(1)
        return _make()

    for _ in range(2):
        assert kept(base, "some-thing", {"n": 2}, make).content == [1, [2]]
    assert made == [1, 1]
    assert watch.once_s == 0


def test_what_is_answered_to_other_records_neighbours_is_asked_again(
    base, phone_book, tmp_path, monkeypatch
):
    """Near misses are made from the records: other records have others."""
    monkeypatch.setenv("MEMLAW_CACHE", str(tmp_path))
    records = [Record(prompt=prompt, completion=text, id=prompt) for prompt, text in phone_book]
    texts = GeneralTexts(retained="", unseen="", unseen_name="")
    near = NearMisses(Subject(base=base, texts=texts, records=records, format="chat"))
    watch = Stopwatch()
    assert near.base_answers
    assert [*(tmp_path / "said").rglob("answers-*")]
    assert watch.once_s == 0
    assert greedy_answers(base, ["Why?"], format="chat", max_tokens=2)
    assert watch.once_s > 0


def test_a_second_write_takes_nothing_once(llama, phone_book, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMLAW_CACHE", str(tmp_path / "cache"))
    how = {"model": str(llama), "specificity": False, "max_epochs": 1, **texts}
    first, second = (memlaw.write(phone_book, tmp_path / name, **how) for name in "ab")
    assert 0 < first.once_s < first.wall_s
    assert second.once_s == 0
    run = json.loads((tmp_path / "a" / "run.json").read_text())
    assert run["timings"]["once_s"] == run["generations"][-1]["once_s"] == first.once_s
