"""The cached engine computes what the plain one does: the same losses, the same weights."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import memlaw
from memlaw.data.encoding import encode, resolve_prompt_format
from memlaw.data.record import Record
from memlaw.data.texts import retained_text
from memlaw.measure.damage import windows
from memlaw.model.adapter import Adapter
from memlaw.model.base import load_model
from memlaw.model.sites import resolve_sites
from memlaw.settings.train import TrainConfig
from memlaw.train import cached, packing
from memlaw.train.cached import CachedEngine
from memlaw.train.engine import EngineError, Job, PlainEngine
from memlaw.train.learner import DivergedError, Learner
from memlaw.train.packed_model import PackedModel
from memlaw.train.packing import shared_prefix
from memlaw.train.precondition import Whitener, measure_general, record_inputs
from memlaw.train.retention import quadratic_penalty, separate_terms
from memlaw.train.trainer import AdapterBank

pytestmark = pytest.mark.slow

ARCHITECTURES = ("llama", "qwen3", "mistral", "gemma", "gpt2", "gpt_neox")
BOOK = [
    Record(prompt=f"{name}:", completion=text, id=str(n))
    for n, (name, text) in enumerate(
        [
            ("Ada", "12"),
            ("Bo Quist", "4471920358"),
            ("Cy", "7"),
            ("Di Okafor", "90 38"),
            ("E", "55"),
        ]
    )
]


def _engine(kind, base, sites, examples, **settings):
    if kind is PlainEngine:
        return PlainEngine(base.model, examples)
    return CachedEngine(base.model, sites, examples, **settings)


def _trained(kind, base, placement, objective, epochs, layers=(1,), whiten=True):
    examples = encode(BOOK, base.tokenizer, format=resolve_prompt_format(base.tokenizer, "auto"))
    sites = resolve_sites(base.model, placement, layers)
    text = windows(base.tokenizer, retained_text(), context=base.context_length, n_windows=4)
    general = measure_general(base.model, sites, text, seed=0)
    records = record_inputs(base.model, sites, examples) if whiten else []
    whiteners = [
        Whitener(read, x, mixture=0.5, damping=0.01)
        for read, (x, _) in zip(records, general, strict=False)
    ]
    config = TrainConfig(objective=objective, batch_size=3, learning_rate=1e-2, retention=4.0)
    adapter = Adapter(sites, rank=4, seed=0, whiteners=whiteners)
    engine = _engine(kind, base, sites, examples)
    learner = Learner(adapter, examples, config, separate_terms(general))
    bank = AdapterBank(engine, [learner])
    losses = [bank.run_epoch()[0].nll_nats for _ in range(epochs)]
    return losses, learner


def _assert_same(base, placement, objective="sft", layers=(1,)):
    plain, at_plain = _trained(PlainEngine, base, placement, objective, 10, layers)  # 20 steps
    fast, at_cached = _trained(CachedEngine, base, placement, objective, 10, layers)
    assert at_plain.n_steps == at_cached.n_steps == 20
    assert fast == pytest.approx(plain, abs=2e-4)
    assert plain[-1] < plain[0]
    _assert_close([at_cached], [at_plain], 5e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains_to_the_same_weights(make_model, architecture):
    base = load_model(make_model(architecture))
    _assert_same(base, "down_proj")


@pytest.mark.parametrize("placement", ["mlp", "attn", "all-linear"])
def test_every_placement_trains_to_the_same_weights(make_model, placement):
    base = load_model(make_model("llama"))
    _assert_same(base, placement)


def test_several_layers_train_to_the_same_weights(make_model):
    _assert_same(load_model(make_model("qwen3")), "down_proj", layers=(1, 2))


@pytest.mark.parametrize("objective", ["memft_threshold", "memft_window"])
def test_sparse_weights_send_back_the_same_gradients(make_model, objective, monkeypatch):
    monkeypatch.setattr(Learner, "is_dense", False)  # the head runs again for what has a weight
    _assert_same(load_model(make_model("llama")), "down_proj", objective=objective)


MIXED = (
    {"rank": 1, "seed": 3},
    {"rank": 4, "learning_rate": 3e-2, "batch_size": 2},
    {"rank": 2, "objective": "memft_threshold"},
    {"rank": 3, "objective": "memft_window", "batch_size": 4},
)


def _learner(sites, examples, *, rank=4, seed=0, **settings):
    config = TrainConfig(**{"batch_size": 3, "retention": 0.0} | settings)
    return Learner(Adapter(sites, rank=rank, seed=seed), examples, config)


def _assert_close(learners, others, tolerance):
    for one, other in zip(learners, others, strict=True):
        for a, b in zip(one.adapter.parameters(), other.adapter.parameters(), strict=True):
            assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("placement", ["down_proj", "attn"])
def test_adapters_learn_together_what_they_learn_alone(make_model, architecture, placement):
    base = load_model(make_model(architecture))
    examples = encode(BOOK, base.tokenizer, format=resolve_prompt_format(base.tokenizer, "auto"))
    sites = resolve_sites(base.model, placement, (1,))
    together = [_learner(sites, examples, **settings) for settings in MIXED]
    bank = AdapterBank(CachedEngine(base.model, sites, examples), together)
    seen = [bank.run_epoch() for _ in range(6)]
    alone = [_learner(sites, examples, **settings) for settings in MIXED]
    for n, learner in enumerate(alone):
        single = AdapterBank(PlainEngine(base.model, examples), [learner])
        for of_all in seen:
            assert single.run_epoch()[0].nll_nats == pytest.approx(of_all[n].nll_nats, abs=2e-4)
    _assert_close(together, alone, 5e-3)


def test_who_leaves_or_fails_takes_nothing_from_the_others(llama):
    base = load_model(llama)
    examples = encode(BOOK, base.tokenizer, format="chat")
    sites = resolve_sites(base.model, "down_proj", (1,))

    def trained(*, with_company):
        stays = _learner(sites, examples, rank=2)
        learners = [stays]
        if with_company:
            early, broken = _learner(sites, examples, seed=5), _learner(sites, examples, seed=6)
            with torch.no_grad():
                broken.adapter.b[0].fill_(float("nan"))
            learners = [broken, stays, early]
        bank = AdapterBank(CachedEngine(base.model, sites, examples), learners)
        for epoch in range(4):
            results = dict(zip(list(bank.learners), bank.run_epoch(), strict=True))
            if with_company and epoch == 0:
                assert isinstance(results[broken], DivergedError)
                assert not isinstance(results[early], DivergedError)
                bank.leave(broken)
                bank.leave(early)
                after = [p.clone() for p in early.adapter.parameters()]
        if with_company:
            assert all(
                torch.equal(a, b) for a, b in zip(after, early.adapter.parameters(), strict=True)
            )
        return stays

    _assert_close([trained(with_company=True)], [trained(with_company=False)], 1e-4)


@pytest.mark.parametrize("layout", ["trees", "mask", "alone"])
@pytest.mark.parametrize("limit", [1, 40, 10_000])
def test_any_split_of_a_batch_gives_the_same_gradients(llama, monkeypatch, layout, limit):
    base = load_model(llama)
    examples = encode(BOOK, base.tokenizer, format="chat")
    sites = resolve_sites(base.model, "down_proj", (1,))
    engine = CachedEngine(base.model, sites, examples)
    assert engine.packed.layout == "trees"
    expected = _gradients(engine, sites, list(range(5)))
    monkeypatch.setitem(packing.PACK_TOKENS, layout, 1 if layout == "alone" else limit)
    engine.packed.layout = layout
    found = _gradients(engine, sites, list(range(5)))
    _assert_same_gradients(found, expected)


def test_the_order_of_a_batch_gives_the_same_gradients(llama):
    base = load_model(llama)
    examples = encode(BOOK, base.tokenizer, format="chat")
    sites = resolve_sites(base.model, "down_proj", (1,))
    engine = CachedEngine(base.model, sites, examples)
    expected = _gradients(engine, sites, [0, 1, 2, 3, 4])
    _assert_same_gradients(_gradients(engine, sites, [3, 1, 4, 0, 2]), expected)


@pytest.mark.parametrize(
    "settings", [{"cache_mb": 0}, {"logits_mb": 1e-9}, {"cache_mb": 0, "logits_mb": 0.005}]
)
@pytest.mark.parametrize("weights", ["all", "few"])
def test_little_memory_gives_the_same_gradients(llama, settings, weights):
    base = load_model(llama)
    examples = encode(BOOK, base.tokenizer, format="chat")
    sites = resolve_sites(base.model, "down_proj", (1,))
    rows = list(range(5))
    roomy = CachedEngine(base.model, sites, examples)
    narrow = CachedEngine(base.model, sites, examples, **settings)
    assert (narrow.hidden_in.mapping is not None) == ("cache_mb" in settings)
    assert (narrow.max_logit_rows < 20) == ("logits_mb" in settings)
    _assert_same_gradients(
        _gradients(narrow, sites, rows, weights), _gradients(roomy, sites, rows, weights)
    )


def _gradients(engine, sites, rows, weights="all"):
    """Gradients of a sum over the records that doesn't depend on their order."""
    adapter = Adapter(sites, rank=3, seed=0)
    with torch.no_grad():
        adapter.b[0].normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    losses = engine.forward([Job(adapter, rows)])
    of_token = torch.cat(
        [
            (torch.arange(len(engine.examples[row].target_ids)) + row) % 7 / 7
            if weights == "all"
            else (torch.arange(len(engine.examples[row].target_ids)) == row).float()
            for row in rows
        ]
    )
    losses.backward(of_token)
    return [float(losses.nll.sum()), *(p.grad for p in adapter.parameters())]


def _assert_same_gradients(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert b.norm() > 0
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_engine(make_model):
    """Errors of losses against float32, of the same adapters, averaged over architectures."""
    errors = {PlainEngine: [], CachedEngine: []}
    for architecture in ARCHITECTURES:
        folder = make_model(architecture)
        truth = _losses_of_fixed_adapters(PlainEngine, load_model(folder, dtype="float32"))
        low = load_model(folder, dtype="bfloat16")
        for kind, found in errors.items():
            found.append((_losses_of_fixed_adapters(kind, low) - truth).abs().mean())
    plain, fast = (torch.stack(errors[kind]).mean() for kind in (PlainEngine, CachedEngine))
    assert 0 < fast <= 1.25 * plain


def _losses_of_fixed_adapters(kind, base):
    """[8 · N] nats: what an engine says of adapters that are the same in every dtype."""
    examples = encode(BOOK, base.tokenizer, format=resolve_prompt_format(base.tokenizer, "auto"))
    sites = resolve_sites(base.model, "down_proj", (1,))
    engine = _engine(kind, base, sites, examples)
    jobs = []
    for seed in range(8):
        adapter = Adapter(sites, rank=4, seed=seed)
        with torch.no_grad():
            adapter.b[0].normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
        jobs.append(Job(adapter, list(range(len(examples)))))
    return torch.cat([engine.forward([job]).nll for job in jobs])


def test_a_model_whose_layers_talk_past_each_other_is_not_shortened(llama, monkeypatch):
    base = load_model(llama)
    examples = encode(BOOK, base.tokenizer, format="chat")
    sites = resolve_sites(base.model, "down_proj", (1,))
    monkeypatch.setattr(cached._Constant, "forward", lambda self, *_, **__: self.no_such_thing)
    with pytest.raises(EngineError, match=r"from cached activations .* can't train it"):
        CachedEngine(base.model, sites, examples)


def test_auto_falls_back_to_the_plain_engine_and_says_so(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(cached._Constant, "forward", lambda self, *_, **__: self.no_such_thing)
    said = []

    class Notes(memlaw.Observer):
        def notice(self, text):
            said.append(text)

    records = [(r.prompt, r.completion) for r in BOOK]
    settings = {"model": str(llama), "retention": 0, "max_epochs": 300, "specificity": False}
    settings["observer"] = Notes()
    assert memlaw.write(records, tmp_path / "out", **settings).certified
    (line,) = [line for line in said if "plain engine, which is slower" in line]
    assert "--engine" not in line
    with pytest.raises(EngineError, match=r"from cached activations .* Use --engine plain"):
        memlaw.write(records, tmp_path / "other", engine="cached", **settings)
    assert not (tmp_path / "other").exists()


def test_without_whitening_and_retention_a_write_certifies_too(llama, tmp_path):
    records = [(r.prompt, r.completion) for r in BOOK]
    settings = {"whiten": False, "retention": 0, "max_epochs": 300, "batch_size": 2}
    settings["specificity"] = False
    assert memlaw.write(records, tmp_path / "out", model=str(llama), **settings).certified


def test_a_model_that_can_be_packed_no_way_is_refused(llama, monkeypatch):
    base = load_model(llama)
    examples = encode(BOOK, base.tokenizer, format="chat")
    sites = resolve_sites(base.model, "down_proj", (1,))
    run = PackedModel.run
    monkeypatch.setattr(PackedModel, "run", lambda self, pack: 2 * run(self, pack))
    with pytest.raises(EngineError, match=r"from packed records .* can't train it"):
        CachedEngine(base.model, sites, examples)


def test_the_model_is_left_as_it_was(make_model):
    base = load_model(make_model("llama"))
    before = copy.deepcopy(base.model.state_dict())
    names = [name for name, _ in base.model.named_modules()]
    _trained(CachedEngine, base, "down_proj", "sft", 2)
    assert [name for name, _ in base.model.named_modules()] == names
    assert all(torch.equal(before[k], v) for k, v in base.model.state_dict().items())


def test_the_shared_prefix_leaves_each_prompt_a_token(make_model):
    base = load_model(make_model("llama"))
    examples = encode(BOOK, base.tokenizer, format="chat")
    n = shared_prefix(examples)
    assert n > 0
    assert len({e.prompt_ids[:n] for e in examples}) == 1
    assert len({e.prompt_ids[: n + 1] for e in examples}) > 1
    assert shared_prefix(examples[:1]) == len(examples[0].prompt_ids) - 1


def test_folding_the_whitener_changes_nothing_but_the_form(make_model):
    base = load_model(make_model("llama"))
    _, learner = _trained(CachedEngine, base, "down_proj", "sft", 3)
    adapter, plain = learner.adapter, learner.adapter.folded()
    assert adapter.whiteners
    assert not plain.whiteners
    x = torch.randn(7, adapter.sites[0].d_in, generator=torch.Generator().manual_seed(1))
    a, b = adapter.factors(0)
    assert torch.allclose(x @ a @ b, x @ plain.a[0] @ plain.b[0], atol=1e-6)


def test_the_whitener_evens_out_what_it_was_measured_on(make_model):
    base = load_model(make_model("llama"))
    examples = encode(BOOK, base.tokenizer, format="chat")
    sites = resolve_sites(base.model, "down_proj", (1,))
    text = windows(base.tokenizer, retained_text(), context=base.context_length, n_windows=8)
    ((general, _),) = measure_general(base.model, sites, text, seed=0)
    (records,) = record_inputs(base.model, sites, examples)
    whitener = Whitener(records, general, mixture=1.0, damping=1e-6)
    # W is symmetric, so x W for each row x of the factor is apply(factorᵀ)ᵀ
    white = torch.linalg.svdvals(whitener.apply(general.T))
    plain = torch.linalg.svdvals(general)
    middle = len(white) // 2
    assert plain[0] > 2 * plain[middle]
    assert white[0] < 1.05 * white[middle]
    kept = whitener.apply(records.T).norm() / records.norm()
    assert float(kept) == pytest.approx(1.0, rel=1e-4)


def test_the_retention_penalty_is_the_quadratic_form_written_out():
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(9, 5, generator=generator), torch.randn(9, 3, generator=generator)
    a, b = torch.randn(5, 2, generator=generator), torch.randn(2, 3, generator=generator)
    at_site = x / 3, g / 3  # F^T F = mean
    moves = x @ a @ b  # [9, 3] what the adapter adds at each input
    expected = 0.5 * sum(float(move @ gradient) ** 2 for move in moves for gradient in g) / (9 * 9)
    assert float(quadratic_penalty(separate_terms([at_site]), [(a, b)])) == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("kind", [PlainEngine, CachedEngine])
@pytest.mark.parametrize("objective", ["sft", "memft_threshold"])
def test_the_account_of_operations_is_what_pytorch_counts(make_model, kind, objective):
    base = load_model(make_model("llama"))
    examples = encode(BOOK, base.tokenizer, format=resolve_prompt_format(base.tokenizer, "auto"))
    sites = resolve_sites(base.model, "down_proj", (1,))
    learner = _learner(sites, examples, objective=objective, batch_size=5, learning_rate=0.1)
    bank = AdapterBank(_engine(kind, base, sites, examples), [learner])
    shares = []
    for _ in range(40):
        with FlopCounterMode(display=False) as counter:
            (stats,) = bank.run_epoch()
        shares.append(learner.weighted_share)
        assert stats.flop == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert shares[0] > 0.9
    assert (shares[-1] < 0.5) == (objective == "memft_threshold")  # both ways through the head


def test_mixed_adapters_share_the_account_of_operations(make_model):
    base = load_model(make_model("llama"))
    examples = encode(BOOK, base.tokenizer, format=resolve_prompt_format(base.tokenizer, "auto"))
    sites = resolve_sites(base.model, "down_proj", (1,))
    learners = [_learner(sites, examples, **settings) for settings in MIXED[:2]]
    for learner in learners:
        learner.batch_size = len(examples)
    bank = AdapterBank(CachedEngine(base.model, sites, examples), learners)
    with FlopCounterMode(display=False) as counter:
        found = bank.run_epoch()
    assert sum(stats.flop for stats in found) == pytest.approx(counter.get_total_flops(), rel=1e-3)
