"""The gate: what it is solved from is right, and it parts near misses from records."""

import dataclasses

import pytest
import torch
from test_held_learner import Ready

from memlaw.model.adapter import Adapter
from memlaw.model.base import load_model
from memlaw.train import gate
from memlaw.train.cached import CachedEngine
from memlaw.train.engine import Job, PlainEngine
from memlaw.train.trainer import AdapterBank

pytestmark = pytest.mark.slow
KINDS = [PlainEngine, CachedEngine]


@pytest.fixture(params=["llama", "gpt2"])
def ready(request, make_model, phone_book):
    return Ready(load_model(make_model(request.param), dtype="float32"), phone_book)


def _frozen(sites):
    adapter = Adapter(sites, rank=2, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for b in adapter.b:
            b.copy_(0.1 * torch.randn(b.shape, generator=generator))
    return adapter.requires_grad_(False)


def test_both_engines_probe_the_same(ready):
    """Hidden states, inputs, and gradients at the output of the upper site."""
    rows, module = [0, 2, len(ready.records), len(ready.records) + 1], ready.sites[1].module
    found = []
    for kind in KINDS:
        hidden, reads, probes = ready.engine(kind).probed(Job(_frozen(ready.sites), rows), [module])
        hidden.float().square().sum().backward()
        gradients = torch.cat([probe.grad for probe in probes[0]])
        assert len(hidden) == len(reads[0]) == len(gradients)
        assert gradients.abs().sum() > 0
        found.append((hidden.detach(), reads[0], gradients))
    for plain, cached in zip(*found, strict=True):
        assert torch.allclose(plain, cached, rtol=1e-3, atol=1e-4)


def test_a_look_gives_the_slope_of_the_log_odds(ready):
    """Against a finite difference: a small gate, looked at without and with it."""
    engine = ready.engine(CachedEngine)
    first = sorted({record.target_ids[0] for record in ready.records})
    rows = [len(ready.records) + i for i in range(6)]
    without, with_gate = Adapter(ready.sites, rank=2, seed=0), Adapter(ready.sites, rank=2, seed=0)
    look = gate._look(engine, without, [1], rows, first)
    a = 0.01 * torch.randn(ready.sites[1].d_in, generator=torch.Generator().manual_seed(2))
    (b,) = gate._outputs([look])
    gate._install(with_gate, [1], a, [b])
    moved = gate._look(engine, with_gate, [1], rows, first).z - look.z
    expected = (look.reads @ a) * (look.gradients[0] @ b)
    assert moved.abs().max() > 1e-4
    # What it writes at earlier positions reaches the last one, too, through the layers above.
    assert torch.allclose(moved, expected, rtol=0.3, atol=0.3 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_near_misses_are_parted_from_records(ready, kind):
    """Seed 0: trained without near misses they all begin like records; the gate parts them."""
    engine = ready.engine(kind)
    learner = ready.learner(engine)
    bank = AdapterBank(engine, [learner])
    learner.holding.recipe = dataclasses.replace(learner.holding.recipe, start_nats=0.0)
    learner.holding.active = False
    for _ in range(60):
        bank.run_epoch()
    rank = learner.adapter.rank
    first = sorted({record.target_ids[0] for record in ready.records})
    near = learner.holding.rows[: learner.holding.n_near]

    def odds(rows):
        adapter = learner.adapter
        sites = [1]
        return gate._look(engine, adapter, sites, rows, first).z

    before = odds(near)
    gate.put_gate(engine, learner)
    after, records = odds(near), odds(list(range(len(ready.records))))
    assert learner.adapter.rank == rank + 1
    assert learner.holding.gate == rank
    limits = (gate._log_odds(engine, engine.base.at(near), first) + 1).clamp(min=-gate._MARGIN)
    over, left = ((z - limits).clamp(min=0).max() for z in (before, after))
    assert over > 2
    assert left < 0.25 * over
    assert records.min() > 1.5  # asked for: 1.6
    assert records.min() > after.mean()


def test_the_log_odds_are_those_of_the_first_tokens():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    (z,) = gate._odds_of(logits, [1, 3])
    p = logits.softmax(dim=1)[0]
    assert float(z) == pytest.approx(float(((p[1] + p[3]) / (p[0] + p[2])).log()), rel=1e-5)
