"""Training beside negatives: both engines compute the same, from the same start."""

import dataclasses

import pytest
import torch

from memlaw.data.encoding import encode, resolve_prompt_format
from memlaw.data.record import Record
from memlaw.data.texts import GeneralTexts
from memlaw.measure.subject import Subject
from memlaw.model.adapter import Adapter
from memlaw.model.base import load_model
from memlaw.model.sites import resolve_sites
from memlaw.settings.recipe import RECIPE
from memlaw.settings.train import TrainConfig
from memlaw.train import packing
from memlaw.train.cached import CachedEngine
from memlaw.train.domains import Domain, measure_domains
from memlaw.train.engine import Job, PlainEngine
from memlaw.train.joint import joint_samples
from memlaw.train.negatives import make_negatives
from memlaw.train.specificity import held_learner
from memlaw.train.trainer import AdapterBank

pytestmark = pytest.mark.slow

SMALL = dataclasses.replace(
    RECIPE,
    pool=40,
    own_chats=6,
    everyday_chats=30,
    answer_tokens=5,
    near_per_step=4,
    chats_per_step=3,
    start_nats=1e9,
    text_windows=4,
    text_tokens=24,
)


@pytest.fixture(params=["llama", "gpt2", "gemma"])
def base(request, make_model):
    """Models with and without a chat template."""
    return load_model(make_model(request.param), dtype="float32")


def _has_system_message(chat):
    prompt = chat.record.prompt
    return not isinstance(prompt, str) and prompt[0]["role"] == "system"


class Ready:
    """Records, negatives and the sites of an adapter."""

    def __init__(self, base, book, layers=(1, 2), placement="down_proj"):
        self.base = base
        format = resolve_prompt_format(base.tokenizer, "auto")
        records = [Record(prompt=p, completion=c, id=f"r{i}") for i, (p, c) in enumerate(book)]
        self.records = encode(records, base.tokenizer, format=format)
        subject = Subject(
            base=base,
            texts=GeneralTexts(retained="", unseen="", unseen_name=""),
            records=records,
            format=format,
        )
        self.negatives = make_negatives(subject, self.records, recipe=SMALL)
        begun = [c for c in self.negatives.chats if _has_system_message(c)]
        chats = [*begun[:2], *(c for c in self.negatives.chats[:4] if c not in begun)]
        self.negatives = dataclasses.replace(self.negatives, chats=chats)
        self.examples = [*self.records, *self.negatives.examples]
        self.sites = resolve_sites(base.model, placement, layers)
        self.held = range(len(self.records), len(self.examples))

    def engine(self, kind):
        if kind is PlainEngine:
            return PlainEngine(self.base.model, self.examples, sites=self.sites, held=self.held)
        n_alike = len(self.records) + len(self.negatives.near)
        return CachedEngine(
            self.base.model, self.sites, self.examples, held=self.held, n_alike=n_alike
        )

    def domains(self):
        words = torch.arange(2 * 20).reshape(2, 20) + 40
        return measure_domains(self.base, self.sites, words, [self.negatives.chats], recipe=SMALL)

    def learner(self, engine, **settings):
        config = TrainConfig(
            **{"objective": "sft", "batch_size": 3, "retention": 500.0, "learning_rate": 1e-2}
            | settings
        )
        return held_learner(
            self.base,
            engine,
            self.sites,
            self.records,
            self.negatives,
            self.domains(),
            config,
            SMALL,
            rank=3,
            max_epochs=10,
        )


@pytest.fixture
def ready(base, phone_book):
    return Ready(base, phone_book)


def _moved_adapter(sites):
    adapter = Adapter(sites, rank=2, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for b in adapter.b:
            b.normal_(std=0.3, generator=generator)
    return adapter


def _alike(found, expected, tolerance):
    assert float(expected.norm()) > 0
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


def test_packs_hold_chats_that_begin_otherwise(make_model, phone_book):
    ready = Ready(load_model(make_model("llama"), dtype="float32"), phone_book)
    engine = ready.engine(CachedEngine)
    assert engine.packed.layout == "trees"
    assert engine.packed.packer.n_prefix >= 5  # the template's head
    assert 0 < sum(not shares for shares in engine.packed.packer.shares) < len(ready.held)


def test_the_bare_model_says_the_same_in_both_engines(ready):
    plain, cached = (ready.engine(kind).base for kind in (PlainEngine, CachedEngine))
    _alike(cached.at(ready.held), plain.at(ready.held), 1e-4)
    _alike(cached.reads, plain.reads, 1e-4)


@pytest.mark.parametrize("kind", [PlainEngine, CachedEngine])
def test_what_changes_nothing_has_no_divergence(ready, kind):
    engine = ready.engine(kind)
    adapter = Adapter(ready.sites, rank=1, seed=0)
    losses = engine.forward([Job(adapter, [0, 1], held=list(ready.held))])
    assert float(losses.kl.abs().max()) < 1e-4
    moved = engine.forward([Job(_moved_adapter(ready.sites), [0, 1], held=list(ready.held))])
    assert float(moved.kl.min()) > -1e-5
    assert float(moved.kl.mean()) > 1e-3


@pytest.mark.parametrize("layout", ["trees", "mask", "alone"])
def test_losses_divergences_and_gradients_are_the_same(ready, layout, monkeypatch):
    found = []
    for kind in (PlainEngine, CachedEngine):
        engine = ready.engine(kind)
        if kind is CachedEngine:
            monkeypatch.setitem(packing.PACK_TOKENS, layout, 1 if layout == "alone" else 300)
            engine.packed.layout = layout
        adapter = _moved_adapter(ready.sites)
        held = [*ready.held[::3], *ready.held[-3:]]
        losses = engine.forward([Job(adapter, [2, 0, 1], held=held)])
        weights, kl_weights = (
            torch.linspace(0, 1, len(values)) for values in (losses.nll, losses.kl)
        )
        losses.backward(weights, kl_weights)
        found.append((losses.nll, losses.kl, *(p.grad for p in adapter.parameters())))
    for plain, cached in zip(*found, strict=True):
        _alike(cached, plain, 2e-4)


def test_the_gradient_is_autograds(ready):
    """Of records and held examples together, through the whole model at once."""
    engine, adapter = ready.engine(CachedEngine), _moved_adapter(ready.sites)
    held = list(ready.held[-4:])
    losses = engine.forward([Job(adapter, [0, 1], held=held)])
    weights, kl_weights = torch.ones_like(losses.nll), torch.full_like(losses.kl, 3.0)
    losses.backward(weights, kl_weights)
    again = _moved_adapter(ready.sites)
    total = torch.zeros(())
    model = ready.base.model
    for row in [0, 1, *held]:
        example = ready.examples[row]
        ids = torch.tensor([example.prompt_ids + example.target_ids])
        at = slice(len(example.prompt_ids) - 1, -1)
        with torch.no_grad():
            before = model(ids).logits[0, at].log_softmax(-1)
        with again.attached(model):
            after = model(ids).logits[0, at].log_softmax(-1)
        if row in held:
            total = total + 3 * (before.exp() * (before - after)).sum()
        else:
            total = total - after.gather(1, torch.tensor(example.target_ids)[:, None]).sum()
    total.backward()
    for a, b in zip(adapter.parameters(), again.parameters(), strict=True):
        _alike(a.grad, b.grad, 5e-4)


@pytest.mark.parametrize("placement", ["down_proj", "attn"])
def test_both_engines_train_to_the_same_weights(make_model, phone_book, placement):
    ready = Ready(load_model(make_model("llama"), dtype="float32"), phone_book, placement=placement)
    learners = []
    for kind in (PlainEngine, CachedEngine):
        engine = ready.engine(kind)
        learner = ready.learner(engine)
        bank = AdapterBank(engine, [learner])
        for _ in range(4):
            bank.run_epoch()
        learners.append(learner)
    plain, cached = learners
    assert plain.n_steps == cached.n_steps == 8
    _alike(cached.holding.last_kl, plain.holding.last_kl, 2e-2)
    for a, b in zip(cached.holding.mean, plain.holding.mean, strict=True):
        _alike(a, b, 1e-2)
    assert float(plain.holding.last_kl.min()) < 0.9  # some were seen


def test_a_restored_learner_goes_on_as_if_nothing_had_been(make_model, phone_book):
    ready = Ready(load_model(make_model("llama"), dtype="float32"), phone_book)
    engine = ready.engine(CachedEngine)

    def run(learner, epochs):
        bank = AdapterBank(engine, [learner])
        bank.flop_there = bank.flop_back = 0.0  # counting operations rounds otherwise
        for _ in range(epochs):
            bank.run_epoch()
        return learner

    whole = run(ready.learner(engine), 6)
    half = run(ready.learner(engine), 3)
    tensors, values = half.state()
    resumed = ready.learner(engine)
    resumed.restore(tensors, values)
    run(resumed, 3)
    expected, _ = whole.state()
    found, _ = resumed.state()
    assert found.keys() == expected.keys()
    assert "holding.mean.0" in found
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_joint_samples_of_one_length_are_those_of_each_by_itself(base):
    sites = resolve_sites(base.model, "down_proj", (1, 2))
    texts = [[5, 6, 7, 8, 9], [40, 41, 42], [50, 51, 52, 53]]
    reads, writes = joint_samples(base.model, sites, texts, first=[0, 0, 0], seed=0, most=100)
    assert [len(x) for x in (*reads, *writes)] == [2 + 3 + 4] * 4
    at = 0
    for text in sorted(texts, key=len):
        alone, _ = joint_samples(base.model, sites, [text], first=[0], seed=0, most=100)
        for together, single in zip(reads, alone, strict=True):
            assert torch.allclose(together[at : at + len(single)], single, rtol=1e-3, atol=1e-4)
        at += len(text) - 1


def test_domains_in_which_nothing_is_looked_at_are_left_out(ready, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMLAW_CACHE", str(tmp_path))
    assert [round(d.share, 3) for d in ready.domains()] == [0.167, 0.167, 0.667]
    monkeypatch.setattr("memlaw.train.domains._own_text", lambda *_: [(1,), (1, 2)])
    ready.negatives.chats[:] = []
    (only,) = ready.domains()
    assert only.share == 1
    assert len(only.reads[0]) == 2 * 19  # the last of each window isn't looked at


def test_domains_come_back_from_the_cache_as_they_were(ready, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMLAW_CACHE", str(tmp_path))
    measured = ready.domains()
    monkeypatch.setattr("memlaw.train.domains.joint_samples", None)
    again = ready.domains()
    assert len(measured) == len(again) == 3
    for one, other in zip(measured, again, strict=True):
        assert isinstance(one, Domain)
        for a, b in zip((*one.reads, *one.writes), (*other.reads, *other.writes), strict=True):
            assert torch.equal(a, b)
            assert float(a.norm()) > 0
