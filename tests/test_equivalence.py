"""The cached engine computes what the plain one does: the same losses, the same weights."""

import copy

import pytest
import torch

from memlaw.adapters import Adapter, resolve_sites
from memlaw.cached import CachedEngine, shared_prefix
from memlaw.damage import retained_text, windows
from memlaw.engine import PlainEngine, TrainConfig
from memlaw.models import load_model
from memlaw.precondition import Whitener, measure_statistics, retention_penalty
from memlaw.records import Record, encode, resolve_prompt_format

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


def _trained(kind, base, placement, objective, epochs, layers=(1,), whiten=True):
    examples = encode(BOOK, base.tokenizer, format=resolve_prompt_format(base.tokenizer, "auto"))
    sites = resolve_sites(base.model, placement, layers)
    text = windows(base.tokenizer, retained_text(), context=base.context_length, n_windows=4)
    statistics = measure_statistics(base.model, sites, examples, text, seed=0)
    whiteners = [Whitener(s, mixture=0.5, damping=0.01) for s in statistics] if whiten else []
    config = TrainConfig(objective=objective, batch_size=3, learning_rate=1e-2, retention=0.1)
    adapter = Adapter(sites, rank=4, seed=0, whiteners=whiteners)
    engine = kind(base.model, adapter, examples, config, statistics)
    losses = [engine.run_epoch().nll_nats for _ in range(epochs)]
    return losses, engine


def _assert_same(base, placement, objective="sft", layers=(1,)):
    plain, at_plain = _trained(PlainEngine, base, placement, objective, 10, layers)  # 20 steps
    cached, at_cached = _trained(CachedEngine, base, placement, objective, 10, layers)
    assert at_plain.n_steps == at_cached.n_steps == 20
    assert cached == pytest.approx(plain, abs=2e-4)
    assert plain[-1] < plain[0]
    for slow, fast in zip(
        at_plain.adapter.parameters(), at_cached.adapter.parameters(), strict=True
    ):
        assert (slow - fast).norm() <= 5e-3 * slow.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains_to_the_same_weights(make_model, architecture):
    base = load_model(make_model(architecture))
    _assert_same(base, "down_proj")


@pytest.mark.parametrize("placement", ["mlp", "attn", "all-linear"])
def test_every_placement_trains_to_the_same_weights(make_model, placement):
    base = load_model(make_model("llama"))
    _assert_same(base, placement)


def test_several_layers_train_to_the_same_weights(make_model):
    _assert_same(load_model(make_model("qwen3")), "down_proj", layers=(0, 1))


@pytest.mark.parametrize("objective", ["memft_threshold", "memft_window"])
def test_sparse_weights_send_back_the_same_gradients(make_model, objective):
    _assert_same(load_model(make_model("llama")), "down_proj", objective=objective)


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
    _, engine = _trained(CachedEngine, base, "down_proj", "sft", 3)
    adapter, plain = engine.adapter, engine.adapter.folded()
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
    (at_site,) = measure_statistics(base.model, sites, examples, text, seed=0)
    whitener = Whitener(at_site, mixture=1.0, damping=1e-6)
    # W is symmetric, so x W for each row x of the factor is apply(factorᵀ)ᵀ
    white = torch.linalg.svdvals(whitener.apply(at_site.general_in.T))
    plain = torch.linalg.svdvals(at_site.general_in)
    middle = len(white) // 2
    assert plain[0] > 2 * plain[middle]
    assert white[0] < 1.05 * white[middle]
    kept = whitener.apply(at_site.records_in.T).norm() / at_site.records_in.norm()
    assert float(kept) == pytest.approx(1.0, rel=1e-4)


def test_the_retention_penalty_is_the_quadratic_form_written_out():
    from memlaw.precondition import Statistics

    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(9, 5, generator=generator), torch.randn(9, 3, generator=generator)
    a, b = torch.randn(5, 2, generator=generator), torch.randn(2, 3, generator=generator)
    at_site = Statistics(records_in=x, general_in=x / 3, general_out=g / 3)  # F^T F = mean
    moves = x @ a @ b  # [9, 3] what the adapter adds at each input
    expected = 0.5 * sum(float(move @ gradient) ** 2 for move in moves for gradient in g) / (9 * 9)
    assert float(retention_penalty([at_site], [(a, b)])) == pytest.approx(expected, rel=1e-5)
