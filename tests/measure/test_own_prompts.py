"""What a base model says itself: sampled and decoded once, and kept."""

import pytest
import torch

from memlaw.measure import own_prompts
from memlaw.measure.own_prompts import greedy_answers, own_conversations, sampled_answers
from memlaw.model.base import load_model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MEMLAW_CACHE", str(folder))
    return folder


@pytest.fixture(params=["llama", "gpt2"])
def base(request, make_model):
    """A model with a chat template, and one without."""
    return load_model(make_model(request.param), dtype="float32")


def _format(base):
    return "chat" if base.tokenizer.chat_template else "plain"


def _all(base):
    format = _format(base)
    own = own_conversations(base, 12, seed=1, format=format)
    return (
        own,
        greedy_answers(base, own, format=format, max_tokens=5),
        sampled_answers(base, own, format=format, seed=1, max_tokens=5),
    )


def test_they_are_distinct_and_another_seed_gives_others(base, cache):
    format = _format(base)
    own = own_conversations(base, 12, seed=1, format=format)
    assert len(own) == len(set(own)) == 12
    assert all(text.strip() == text and text for text in own)
    assert not set(own) & set(own_conversations(base, 12, seed=2, format=format))


def test_what_is_kept_is_what_was_made_and_the_random_state_is_left_alone(base, cache, monkeypatch):
    state = torch.random.get_rng_state()
    first = _all(base)
    assert torch.equal(torch.random.get_rng_state(), state)
    files = sorted(cache.rglob("*.safetensors"))
    assert len(files) == 3

    def refuse(*args, **kwargs):
        raise AssertionError("it was made again")

    with monkeypatch.context() as patch:
        patch.setattr(own_prompts, "sample_decode", refuse)
        patch.setattr(own_prompts, "greedy_decode", refuse)
        assert _all(base) == first
    for path in files:  # a bit flipped, a file cut short, an empty one: made again, and the same
        whole, middle = path.read_bytes(), path.stat().st_size // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        for broken in (flipped, whole[:middle], b""):
            path.write_bytes(broken)
            assert _all(base) == first
            assert path.read_bytes() not in (broken, b"")


def test_a_cache_that_can_not_be_written_is_no_error(base, cache):
    first = _all(base)
    for path in sorted(cache.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    cache.rmdir()
    cache.write_text("a file")
    assert _all(base) == first


def test_greedy_answers_are_the_models_own(base, cache):
    own, greedy, _ = _all(base)
    ids = own_prompts.encode_prompt(base.tokenizer, own[0], _format(base))
    for token in greedy[0]:
        best = int(base.model(torch.tensor([ids])).logits[0, -1].argmax())
        assert best == token
        ids = (*ids, token)
