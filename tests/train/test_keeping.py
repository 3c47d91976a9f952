"""What an update's hold is made of: the gradients of written records' log-odds."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from memlaw.data.encoding import encode
from memlaw.data.record import Record
from memlaw.measure.examine import audit_examples
from memlaw.model.adapter import Adapter
from memlaw.model.base import load_model
from memlaw.model.forward import in_batches
from memlaw.model.head import log_odds
from memlaw.model.sites import decoder_layers, resolve_sites
from memlaw.settings.train import TrainConfig
from memlaw.train.cached import CachedEngine
from memlaw.train.engine import Job, PlainEngine, bare_losses
from memlaw.train.keeping import CALM, HELD, Keeping, odds_gradients
from memlaw.train.learner import Learner
from memlaw.train.retention import Term

ROWS = [0, 1, 3]


@pytest.fixture
def ready(make_model, phone_book):
    base = load_model(make_model("llama"), dtype="float32")
    records = [Record(prompt=p, completion=c, id=p) for p, c in phone_book]
    examples = encode(records, base.tokenizer, format="chat")
    n = len(decoder_layers(base.model)[1])
    sites = resolve_sites(base.model, "down_proj", (n - 2, n - 1))
    adapter = Adapter(sites, rank=2, seed=0)
    with torch.no_grad():
        for b in adapter.b:
            b.copy_(torch.randn(b.shape, generator=torch.Generator().manual_seed(1)))
    return base.model, sites, examples, adapter


def test_log_odds_are_exact_where_p_rounds_to_one():
    logits = torch.tensor([[60.0, 0.0, 0.0], [math.log(3), 0.0, -math.inf]])
    found = log_odds(logits, torch.tensor([0, 0]))
    assert found.tolist() == pytest.approx([60 - math.log(2), math.log(3)])


def test_both_engines_find_the_same_and_leave_no_gradient(ready):
    model, sites, examples, adapter = ready
    plain = odds_gradients(PlainEngine(model, examples), adapter, ROWS, seed=0)
    cached = odds_gradients(CachedEngine(model, sites, examples), adapter, ROWS, seed=0)
    n_tokens = sum(len(examples[row].target_ids) for row in ROWS)
    for site, one, other in zip(sites, plain, cached, strict=True):
        assert one.shape == (n_tokens, site.d_out)
        assert one.norm() > 0
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max()))
    assert all(weights.grad is None for weights in adapter.parameters())


def test_they_tell_how_the_log_odds_move(ready):
    """Against a finite difference, in the last layer, from where no other position is reached."""
    model, _, examples, adapter = ready
    engine = PlainEngine(model, examples)
    gradients = odds_gradients(engine, adapter, ROWS, seed=0)[1]
    n = len(gradients)
    generator = torch.Generator().manual_seed(0)
    torch.randperm(len(ROWS), generator=generator)  # which records; all of them
    signs = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1

    def signed_sum():
        with torch.no_grad():
            hidden, targets = engine.hidden([Job(adapter, ROWS)])
            return float((signs * log_odds(engine.head(hidden), targets)).sum())

    _, (_, reads), _ = engine.probed(Job(adapter, ROWS), [site.module for site in adapter.sites])
    step = 0.1 * torch.randn(adapter.b[1].shape, generator=torch.Generator().manual_seed(2))
    found = []
    with torch.no_grad():
        expected = float(((reads @ adapter.a[1] @ step) * gradients * n**0.5).sum())
        for by in (1, -2):
            adapter.b[1].add_(by * step)
            found.append(signed_sum())
    assert abs(expected) > 5e-3
    assert (found[0] - found[1]) / 2 == pytest.approx(expected, rel=0.02)


def test_probes_are_told_apart_whatever_order_modules_run_in(ready):
    """An OPT layer registers k before v before q, and runs q first."""
    examples = ready[2]
    shape = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(**shape, num_attention_heads=2, vocab_size=600)).eval()
    sites = resolve_sites(model.requires_grad_(False), "attn", (1,))
    engine = PlainEngine(model, examples)
    job = Job(Adapter(sites, rank=1, seed=0).requires_grad_(False), ROWS)

    def gradients(modules):
        hidden, _, probes = engine.probed(job, modules)
        hidden.square().sum().backward()
        return [torch.cat([probe.grad for probe in of_site]) for of_site in probes]

    modules = [site.module for site in sites]
    assert len(modules) >= 4
    alone = [gradients([module])[0] for module in modules]
    for one, together in zip(alone, gradients(modules), strict=True):
        assert torch.allclose(one, together, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], rtol=0.1)


def test_what_the_bare_model_loses_is_what_an_audit_finds(ready):
    model, sites, examples, _ = ready
    audit = audit_examples(model, None, examples, decode="none")
    for engine in (PlainEngine(model, examples), CachedEngine(model, sites, examples)):
        found = bare_losses(engine, sites, len(examples), model.device)
        assert torch.allclose(found, torch.from_numpy(audit.tokens.nll_nats), atol=1e-3)


def test_batches_are_bounded_by_records_and_by_tokens(ready):
    _, _, examples, _ = ready
    rows = list(range(len(examples))) * 40
    batches = in_batches(examples, rows)
    assert [row for batch in batches for row in batch] == rows
    assert max(map(len, batches)) == 64
    long = replace(examples[0], prompt_ids=(1,) * 5000)
    assert [len(batch) for batch in in_batches([long, *examples], [1, 0, 1, 2])] == [1, 1, 2]


@pytest.mark.parametrize(("still", "share"), [(2, HELD), (0, CALM)])
def test_steps_are_as_much_smaller_as_it_says(ready, still, share):
    """AdamW's first step moves each number by the learning rate."""
    _, _, examples, adapter = ready
    learner = Learner(adapter, examples, TrainConfig(learning_rate=0.01, retention=0))
    learner.adapter = adapter.grown(4)
    learner.solver = learner.new_solver()
    drawn = torch.Generator().manual_seed(0)
    term = Term(
        sites=(0,),
        reads=[torch.randn(5, adapter.sites[0].d_in, generator=drawn)],
        writes=[torch.randn(5, adapter.sites[0].d_out, generator=drawn)],
    )
    learner.keeping = Keeping(learner.adapter, [term], 1.0, still, beside=HELD, calm=CALM)
    before = [weights.detach().clone() for weights in learner.adapter.parameters()]
    for weights in learner.adapter.parameters():
        weights.grad = torch.full_like(weights, 1e-3)
    learner.n_looks = 1
    learner.step()
    moved = max(
        float((now.detach() - was).abs().max())
        for now, was in zip(learner.adapter.parameters(), before, strict=True)
    )
    assert moved == pytest.approx(0.01 * share, rel=1e-3)
    for was, a in zip(before[: len(learner.adapter.a)], learner.adapter.a, strict=True):
        assert torch.equal(was[:, :still], a[:, :still])


@pytest.mark.parametrize("still", [0, 2])
def test_leaving_where_it_started_is_what_is_penalized(ready, still):
    """Of all columns, or of those that are trained, whatever they held at the start."""
    adapter = ready[3].grown(4)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for b in adapter.b:
            b[2:] = torch.randn(b[2:].shape, generator=drawn)
    term = Term(
        sites=(0,),
        reads=[torch.randn(5, adapter.sites[0].d_in, generator=drawn)],
        writes=[torch.randn(7, adapter.sites[0].d_out, generator=drawn)],
    )
    keeping = Keeping(adapter, [term], 3.0, still)
    at_start = keeping.loss(adapter).item()
    was = (adapter.a[0] @ adapter.b[0]).detach()
    with torch.no_grad():
        adapter.b[0][2:] += torch.randn(adapter.b[0][2:].shape, generator=drawn)
    moved = adapter.a[0] @ adapter.b[0] - was
    expected = 1.5 * (term.reads[0] @ moved @ term.writes[0].T).square().sum().item()
    assert at_start == pytest.approx(0, abs=1e-6 * expected)
    assert keeping.loss(adapter).item() == pytest.approx(expected, rel=1e-3)
