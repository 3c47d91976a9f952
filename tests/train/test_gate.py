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
def ready(request, make_model, phone_book, monkeypatch):
    # A log-odd costs a random model of two layers more nats than a trained one.
    monkeypatch.setattr(gate, "_HARM_WEIGHT", 3.0)
    return Ready(load_model(make_model(request.param), dtype="float32"), phone_book)


def _frozen(sites):
    adapter = Adapter(sites, rank=2, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for b in adapter.b:
            b.copy_(0.1 * torch.randn(b.shape, generator=generator))
    return adapter.requires_grad_(False)


def test_both_engines_probe_the_same(ready):
    """Hidden states, inputs, and gradients at the outputs of the sites, the lowest one's, too."""
    rows = [0, 2, len(ready.records), len(ready.records) + 1]
    modules = [site.module for site in ready.sites]
    found = []
    for kind in KINDS:
        hidden, reads, probes = ready.engine(kind).probed(Job(_frozen(ready.sites), rows), modules)
        hidden.float().square().sum().backward()
        gradients = [torch.cat([probe.grad for probe in of_site]) for of_site in probes]
        for read, gradient in zip(reads, gradients, strict=True):
            assert len(hidden) == len(read) == len(gradient)
            assert gradient.abs().sum() > 0
        found.append((hidden.detach(), *reads, *gradients))
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
    gate._install(with_gate, [1], 1, a, [b])
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
    gate.add_gate(learner)
    assert torch.allclose(odds(near), before, rtol=0, atol=1e-4)  # room for one, no more
    gate.solve_gate(engine, learner)
    after, records = odds(near), odds(list(range(len(ready.records))))
    assert learner.adapter.rank == rank + 1
    assert learner.holding.gate == rank
    limits = (gate._log_odds(engine, engine.base.at(near), first) + 1).clamp(min=-gate._MARGIN)
    over, left = ((z - limits).clamp(min=0).max() for z in (before, after))
    assert over > 2
    assert left < 0.25 * over
    assert records.min() > 1.5  # asked for: 1.6
    assert records.min() > after.mean()


def test_a_renewed_gate_brings_back_what_steps_have_worn_off(ready):
    """Seed 0: half of the gate is taken away; solved anew, near misses are where they were."""
    engine = ready.engine(CachedEngine)
    learner = ready.learner(engine)
    bank = AdapterBank(engine, [learner])
    learner.holding.recipe = dataclasses.replace(learner.holding.recipe, start_nats=0.0)
    for _ in range(40):
        bank.run_epoch()
    gate.add_gate(learner)
    gate.solve_gate(engine, learner)
    first = sorted({record.target_ids[0] for record in ready.records})
    near = learner.holding.rows[: learner.holding.n_near]
    records = list(range(len(ready.records)))
    limits = (gate._log_odds(engine, engine.base.at(near), first) + 1).clamp(min=-gate._MARGIN)

    def over():
        z = gate._look(engine, learner.adapter, [1], near, first).z
        return float((z - limits).clamp(min=0).mean())

    parted, column = over(), learner.holding.gate
    others = [b.detach().clone()[:column] for b in learner.adapter.b]
    with torch.no_grad():
        for a in learner.adapter.a:
            a[:, column] *= 0.3
    worn = over()
    gate.solve_gate(engine, learner)
    assert worn > parted + 0.2
    assert over() < parted + 0.2 * (worn - parted)
    z = gate._look(engine, learner.adapter, [1], records, first).z
    assert z.min() > 1.5
    # Nothing but the gate's own rank is touched.
    for b, before in zip(learner.adapter.b, others, strict=True):
        assert torch.equal(b[:column], before)


def test_it_is_solved_for_all_records_whichever_are_trained(ready, monkeypatch):
    """As in an update, which trains what is new."""
    engine = ready.engine(CachedEngine)
    learner = ready.learner(engine)
    gate.add_gate(learner)
    learner.train_on([0])
    looked, look = [], gate._look

    def noting(engine, adapter, sites, rows, first):
        looked.append(list(rows))
        return look(engine, adapter, sites, rows, first)

    monkeypatch.setattr(gate, "_look", noting)
    gate.solve_gate(engine, learner)
    assert looked[0] == list(range(len(ready.records)))


def test_the_log_odds_are_those_of_the_first_tokens():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    (z,) = gate._odds_of(logits, [1, 3])
    p = logits.softmax(dim=1)[0]
    assert float(z) == pytest.approx(float(((p[1] + p[3]) / (p[0] + p[2])).log()), rel=1e-5)


def test_a_record_that_failed_an_audit_gives_way_less():
    """Near misses that read just as the first record does: what they are brought down by it is."""
    generator = torch.Generator().manual_seed(0)
    records = torch.randn(2, 6, generator=generator)
    near = records[:1] + 0.3 * torch.randn(8, 6, generator=generator)
    z = {}
    for weight in (1.0, gate._FAILED_WEIGHT):
        problem = gate._Problem(
            b=[torch.ones(1)],
            want=torch.full((2,), 4.0),
            weights=torch.tensor([weight, 1.0]),
            limits=torch.full((8,), -3.0),
            factor=torch.eye(6),
            pull=torch.zeros(6),
        )
        known = gate._Line(rest=torch.full((2,), 4.0), slopes=records)
        others = gate._Line(rest=torch.full((8,), 4.0), slopes=near)
        z[weight] = known.at(gate._solve(known, others, torch.zeros(6), problem))
    asked, more = z[1.0], z[gate._FAILED_WEIGHT]
    assert asked[0] < 4.0 - 0.05
    assert more[0] > asked[0] + 0.03
    assert more[0] <= 4.0 + 1e-3
