"""Activated adapters in training: both engines adapt the same positions, in every layout."""

import pytest
import torch

from memlaw.data.activation import activated, invocation_of
from memlaw.data.encoding import encode, resolve_prompt_format
from memlaw.data.record import Record
from memlaw.model.adapter import Adapter
from memlaw.model.base import load_model
from memlaw.model.sites import resolve_sites
from memlaw.settings.train import TrainConfig
from memlaw.train import packing
from memlaw.train.cached import CachedEngine
from memlaw.train.engine import Job, PlainEngine
from memlaw.train.learner import Learner
from memlaw.train.packing import shared_prefix
from memlaw.train.trainer import AdapterBank

FRONT = ("[b] Ada:", "[b] Bo Quist:", "[b] Cy:", "[b] Di:")  # active in the shared prefix
SPREAD = ("[b] Ada:", "Say, [b] Bo:", "[b] or [b] Cy:", "Di [b]")  # active from here and there
COMPLETIONS = ("12", "4471920358", "7", "90 38")
PROMPTS = {"front": FRONT, "spread": SPREAD}


def _prepared(make_model, architecture, prompts):
    base = load_model(make_model(architecture))
    format = resolve_prompt_format(base.tokenizer, "auto")
    records = [
        Record(prompt=p, completion=c, id=p)
        for p, c in zip(PROMPTS[prompts], COMPLETIONS, strict=True)
    ]
    examples = encode(records, base.tokenizer, format=format)
    ids = invocation_of("[b]", examples, base.tokenizer, format)
    return base, activated(examples, ids), ids


def _adapter(sites, ids, *, rank=3, zero=False):
    adapter = Adapter(sites, rank=rank, seed=0, invocation_ids=ids)
    if not zero:
        with torch.no_grad():
            for i, b in enumerate(adapter.b):
                b.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
    return adapter


def _gradients(engine, adapters):
    losses = engine.forward([Job(a, list(range(len(engine.examples)))) for a in adapters])
    losses.backward((torch.arange(len(losses.nll)) % 7 + 1) / 7)
    return losses.nll, [p.grad for a in adapters for p in a.parameters()]


def _assert_same(found, expected):
    assert torch.allclose(found[0], expected[0], atol=2e-4)
    for a, b in zip(found[1], expected[1], strict=True):
        assert b.norm() > 0
        assert (a - b).norm() <= 1e-3 * b.norm()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("placement", ["down_proj", "attn"])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_both_engines_give_the_same_gradients(make_model, architecture, placement, prompts):
    base, examples, ids = _prepared(make_model, architecture, prompts)
    sites = resolve_sites(base.model, placement, (1,))
    expected = _gradients(PlainEngine(base.model, examples), [_adapter(sites, ids)])
    found = _gradients(CachedEngine(base.model, sites, examples), [_adapter(sites, ids)])
    _assert_same(found, expected)
    always = _gradients(PlainEngine(base.model, examples), [_adapter(sites, ())])
    differs = bool((always[0] - expected[0]).abs().max() > 1e-3)
    assert differs == any(e.active_from > 0 for e in examples)  # a plain prompt may begin with it


@pytest.mark.parametrize("layout", ["trees", "mask", "alone"])
@pytest.mark.parametrize("limit", [1, 40, 10_000])
def test_any_split_of_a_batch_gives_the_same_gradients(make_model, monkeypatch, layout, limit):
    base, examples, ids = _prepared(make_model, "llama", "spread")
    sites = resolve_sites(base.model, "down_proj", (1, 2))
    expected = _gradients(PlainEngine(base.model, examples), [_adapter(sites, ids)])
    engine = CachedEngine(base.model, sites, examples)
    monkeypatch.setitem(packing.PACK_TOKENS, layout, 1 if layout == "alone" else limit)
    engine.packed.layout = layout
    _assert_same(_gradients(engine, [_adapter(sites, ids)]), expected)


def test_adapters_that_are_always_active_share_a_pack(make_model):
    base, examples, ids = _prepared(make_model, "llama", "spread")
    sites = resolve_sites(base.model, "down_proj", (1,))

    def adapters():
        return [_adapter(sites, ids), _adapter(sites, (), rank=2), _adapter(sites, ids, rank=1)]

    expected = _gradients(PlainEngine(base.model, examples), adapters())
    _assert_same(_gradients(CachedEngine(base.model, sites, examples), adapters()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", PROMPTS)
def test_both_engines_train_to_the_same_weights(make_model, prompts):
    base, examples, ids = _prepared(make_model, "llama", prompts)
    sites = resolve_sites(base.model, "down_proj", (1,))
    config = TrainConfig(objective="sft", batch_size=3, retention=0.0)
    trained = []
    for engine in (PlainEngine(base.model, examples), CachedEngine(base.model, sites, examples)):
        learner = Learner(_adapter(sites, ids, zero=True), examples, config)
        bank = AdapterBank(engine, [learner])
        losses = [bank.run_epoch()[0].nll_nats for _ in range(10)]
        assert losses[-1] < losses[0]
        trained.append((losses, learner.adapter))
    (plain, at_plain), (fast, at_fast) = trained
    assert fast == pytest.approx(plain, abs=2e-4)
    for a, b in zip(at_fast.parameters(), at_plain.parameters(), strict=True):
        assert (a - b).norm() <= 5e-3 * b.norm()


def test_what_packs_share_is_active_alike(make_model):
    _, front, _ = _prepared(make_model, "llama", "front")
    assert {e.active_from for e in front} == {front[0].active_from}
    assert shared_prefix(front) > front[0].active_from
    _, spread, _ = _prepared(make_model, "llama", "spread")
    assert shared_prefix(spread) <= min(e.active_from for e in spread)


def test_a_grown_a_folded_and_a_restored_adapter_are_active_where_it_was(make_model):
    base, examples, ids = _prepared(make_model, "llama", "front")
    sites = resolve_sites(base.model, "down_proj", (1,))
    config = TrainConfig(retention=0.0)
    learner = Learner(_adapter(sites, ids), examples, config)
    learner.grow(5)
    assert learner.adapter.invocation_ids == learner.adapter.folded().invocation_ids == ids
    other = Learner(_adapter(sites, ids), examples, config)
    other.restore(*learner.state())
    assert (other.adapter.rank, other.adapter.invocation_ids) == (5, ids)
