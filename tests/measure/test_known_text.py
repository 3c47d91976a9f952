"""Harm to unseen text by what is kept of the bare model is what running it again gives."""

import dataclasses

import pytest
import torch

from memlaw.data.texts import unseen_text
from memlaw.measure.damage import bare_states
from memlaw.measure.unseen_text import UnseenText
from memlaw.model.adapter import Adapter
from memlaw.model.base import load_model
from memlaw.model.sites import resolve_sites


@pytest.fixture
def base(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMLAW_CACHE", str(tmp_path / "cache"))
    return load_model(llama, dtype="float32")


def _adapter(base):
    adapter = Adapter(resolve_sites(base.model, "down_proj", (2,)), rank=2, seed=0)
    with torch.no_grad():
        adapter.b[0].normal_(generator=torch.Generator().manual_seed(0))
    return adapter


@pytest.mark.parametrize("first_layer", [0, 2])
def test_the_second_time_the_bare_model_is_not_run(base, first_layer):
    text, name = unseen_text()
    adapter = _adapter(base)

    def measured():
        here = UnseenText(base, text, name, first_layer)
        return here.measure(base.model, lambda: adapter.attached(base.model))

    runs = []
    hook = base.model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    first, n_first = measured(), len(runs)
    again, n_again = measured(), len(runs) - n_first
    hook.remove()
    assert again == first
    assert first.kl_nats > 0
    n_batches = -(-len(UnseenText(base, text, name).windows) // 8)
    assert n_again == (0 if first_layer else n_batches)
    known = UnseenText(base, text, name, first_layer)
    known.__dict__["known"] = {}
    by_running = known.measure(base.model, lambda: adapter.attached(base.model))
    assert by_running.kl_nats == pytest.approx(first.kl_nats, rel=1e-4)
    assert by_running.base_nll_nats == pytest.approx(first.base_nll_nats, rel=1e-6)
    assert dataclasses.replace(first, by_window=()).text == by_running.text


def test_of_a_users_own_text_nothing_is_kept(base, tmp_path):
    text, name = unseen_text()
    assert UnseenText(base, "Something private. " + text, "mine.txt", 2).known.keys()
    assert not list((tmp_path / "cache").rglob("unseen-text-*"))
    assert UnseenText(base, text, name, 2).known.keys() == {"hidden", "lower"}
    assert len(list((tmp_path / "cache").rglob("unseen-text-*"))) == 1


def test_a_model_of_the_same_weights_that_computes_otherwise_is_run(base):
    text, name = unseen_text()
    usual = UnseenText(base, text, name, 2).known["hidden"]
    base.model.config.rms_norm_eps = 1.0
    for layer in base.model.model.layers:
        layer.input_layernorm.variance_epsilon = 1.0
    assert not torch.allclose(UnseenText(base, text, name, 2).known["hidden"], usual)


def test_a_head_that_is_not_apart_is_run_as_it_is(base, monkeypatch):
    text, name = unseen_text()
    windows = UnseenText(base, text, name).windows[:2]
    monkeypatch.setattr(
        "memlaw.model.forward.logits_of", lambda model, hidden: 2 * model.lm_head(hidden)
    )
    assert bare_states(base.model, windows, 2) == {}
