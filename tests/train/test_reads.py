"""What an engine knows of what a site reads is what the model shows when it is run."""

import pytest

from memlaw.data.encoding import encode
from memlaw.data.record import Record
from memlaw.model.adapter import Adapter
from memlaw.model.base import load_model
from memlaw.model.sites import decoder_layers, resolve_sites
from memlaw.train.cached import CachedEngine
from memlaw.train.engine import Job, PlainEngine
from memlaw.train.precondition import record_inputs

BOOK = [Record(prompt=f"Who is {n}?", completion=f"number {n}", id=n) for n in ("a", "bb", "ccc")]


@pytest.fixture
def loaded(llama):
    base = load_model(llama, dtype="float32")
    return base, encode(BOOK, base.tokenizer, format="plain", max_tokens=None)


def test_the_gram_is_that_of_all_tokens(loaded):
    base, examples = loaded
    sites = resolve_sites(base.model, "down_proj", (2,))
    engine = CachedEngine(base.model, sites, examples)
    assert engine.packed.packer.n_prefix > 0
    rows = [2, 0]
    chosen = [examples[row] for row in rows]
    (expected,) = record_inputs(base.model, sites, chosen)
    (found,) = record_inputs(base.model, sites, chosen, engine, rows)
    assert len(found) < len(expected)  # what they begin with stands there once
    there, here = expected.T @ expected, found.T @ found
    assert (here - there).norm() < 1e-4 * there.norm()


@pytest.mark.parametrize("held", [[], [2]])
def test_no_layer_above_runs_where_nothing_is_held(loaded, held, monkeypatch):
    base, examples = loaded
    sites = resolve_sites(base.model, "down_proj", (1,))
    layers = decoder_layers(base.model)[1]
    assert len(layers) > 2
    ran: list[int] = []
    fill = CachedEngine._fill_cache

    def watched(engine):
        hooks = [
            layer.register_forward_hook(lambda *_, i=i: ran.append(i))
            for i, layer in enumerate(layers)
        ]
        try:
            fill(engine)
        finally:
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(CachedEngine, "_fill_cache", watched)
    engine = CachedEngine(base.model, sites, examples, held=held)
    assert set(ran) == (set(range(len(layers))) if held else {0, 1})
    adapter = Adapter(sites, rank=1, seed=0)
    assert engine.forward([Job(adapter, [0])]).nll.isfinite().all()  # no hook is left that stops it


def test_several_sites_or_another_engine_are_not_known(loaded):
    base, examples = loaded
    two = resolve_sites(base.model, "down_proj", (1, 2))
    assert CachedEngine(base.model, two, examples).reads([0]) is None
    one = resolve_sites(base.model, "down_proj", (2,))
    assert PlainEngine(base.model, examples, sites=one).reads([0]) is None
