"""What an engine knows of what a site reads is what the model shows when it is run."""

import pytest

from memlaw.data.encoding import encode
from memlaw.data.record import Record
from memlaw.model.base import load_model
from memlaw.model.sites import resolve_sites
from memlaw.train.cached import CachedEngine
from memlaw.train.engine import PlainEngine
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


def test_several_sites_or_another_engine_are_not_known(loaded):
    base, examples = loaded
    two = resolve_sites(base.model, "down_proj", (1, 2))
    assert CachedEngine(base.model, two, examples).reads([0]) is None
    one = resolve_sites(base.model, "down_proj", (2,))
    assert PlainEngine(base.model, examples, sites=one).reads([0]) is None
