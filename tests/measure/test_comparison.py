"""Two models along the same texts: the same numbers whichever way they are come by."""

import contextlib
import random

import pytest
import torch

from memlaw.measure.compare import Comparison
from memlaw.model.adapter import Adapter
from memlaw.model.base import load_model
from memlaw.model.sites import resolve_sites


@pytest.fixture
def changed_by(monkeypatch, tmp_path):
    """What a random adapter on a layer changes along random texts, known from `first_layer` on."""
    monkeypatch.setenv("MEMLAW_CACHE", str(tmp_path))
    draw = random.Random(0)
    texts = [
        (
            tuple(draw.choices(range(90), k=draw.randrange(1, 30))),
            tuple(draw.choices(range(90), k=9)),
        )
        for _ in range(40)
    ]

    def compare(folder, layer, first_layer):
        base = load_model(folder, dtype="float32")
        adapter = Adapter(resolve_sites(base.model, "down_proj", (layer,)), rank=4, seed=1)
        torch.manual_seed(0)
        with torch.no_grad():
            for b in adapter.b:
                b.normal_(std=0.3)
        comparison = Comparison(base, texts, first_layer)
        return base, texts, adapter, comparison.of(lambda: adapter.attached(base.model))

    return compare


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma", "gpt2", "gpt_neox"])
def test_lower_layers_are_run_once_and_nothing_changes(make_model, changed_by, name):
    whole = changed_by(make_model(name), 2, 0)[-1]
    assert sum(change.kl > 1e-3 for change in whole) > 30
    for first_layer in (1, 2):
        for _ in range(2):  # computed, and from the cache
            assert changed_by(make_model(name), 2, first_layer)[-1] == whole


def test_it_is_what_cross_entropy_says(llama, changed_by):
    base, texts, adapter, changes = changed_by(llama, 1, 1)

    def log_p(ids):
        with torch.no_grad():
            return base.model(torch.tensor([ids])).logits[0].log_softmax(-1)

    for (given, then), change in list(zip(texts, changes, strict=True))[:5]:
        rows = slice(len(given) - 1, -1)
        found = []
        for context in (contextlib.nullcontext(), adapter.attached(base.model)):
            with context:
                found.append(log_p(given + then)[rows])
        before, after = found
        nll = [-x.gather(1, torch.tensor(then)[:, None]).mean().item() for x in found]
        kl = (before.exp() * (before - after)).sum(1).mean().item()
        assert (change.base_nll, change.nll) == pytest.approx(nll, abs=1e-4)
        assert change.kl == pytest.approx(kl, abs=1e-4)
        assert change.n_tokens == len(then)


def test_of_a_models_own_greedy_answer_every_token_is_the_argmax(llama, monkeypatch, tmp_path):
    from memlaw.measure.decode import greedy_decode

    monkeypatch.setenv("MEMLAW_CACHE", str(tmp_path))
    base = load_model(llama, dtype="float32")
    prompts = [(5, 6, 7), (9, 10)]
    own = greedy_decode(base.model, prompts, end_id=0, max_tokens=[6, 6])
    other = [(*answer[:-1], (answer[-1] + 1) % 90) for answer in own]
    texts = [*zip(prompts, own, strict=True), *zip(prompts, other, strict=True)]
    found = Comparison(base, texts).of(lambda: contextlib.nullcontext(base.model))
    assert [change.base_greedy for change in found] == [True, True, False, False]
    assert [change.greedy for change in found] == [True, True, False, False]


def test_what_the_first_other_token_loses(llama, monkeypatch, tmp_path):
    from memlaw.measure.decode import greedy_decode

    monkeypatch.setenv("MEMLAW_CACHE", str(tmp_path))
    base = load_model(llama, dtype="float32")
    adapter = Adapter(resolve_sites(base.model, "down_proj", (1,)), rank=4, seed=1)
    torch.manual_seed(0)
    with torch.no_grad():
        for b in adapter.b:
            b.normal_(std=0.05)
    prompts = [(i, i + 1) for i in range(5, 25)]
    own = greedy_decode(base.model, prompts, end_id=0, max_tokens=[6] * 20)
    texts = list(zip(prompts, own, strict=True))
    lost = []
    for given, then in texts:
        rows = slice(len(given) - 1, -1)
        with torch.no_grad():
            before = base.model(torch.tensor([given + then])).logits[0, rows].log_softmax(-1)
            with adapter.attached(base.model):
                now = base.model(torch.tensor([given + then])).logits[0, rows].argmax(1).tolist()
        left = [i for i, token in enumerate(now) if token != then[i]][:1]
        lost.append(sum((before[i, then[i]] - before[i, now[i]]).item() for i in left))
    found = Comparison(base, texts, 1).of(lambda: adapter.attached(base.model))
    assert [change.lost_nats for change in found] == pytest.approx(lost, abs=1e-4)
    assert 0 < sum(x > 0 for x in lost) < 20
    assert [change.greedy for change in found] == [x == 0 for x in lost]
