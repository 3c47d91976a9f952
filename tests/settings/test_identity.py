"""What a result is known by, and what may be added without giving it another name."""

import dataclasses
import importlib
import importlib.util
import inspect
import json
import sys
import typing
import warnings
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import memlaw
from memlaw.core import moved
from memlaw.settings import choices
from memlaw.settings.train import TrainConfig
from memlaw.train.objectives import OBJECTIVES


def test_every_setting_that_was_there_first_is_always_named():
    named = TrainConfig().identity()
    assert len(named) == 17
    assert named == dataclasses.asdict(TrainConfig())


def test_a_younger_setting_is_named_only_where_it_says_something(monkeypatch):
    monkeypatch.setattr(
        "memlaw.settings.train._FIRST", frozenset(TrainConfig().identity()) - {"dropout"}
    )
    assert "dropout" not in TrainConfig().identity()
    assert TrainConfig(dropout=0.5).identity()["dropout"] == 0.5


def _without(checkpoint, setting):
    """Make a checkpoint one of a version that didn't know a setting."""
    with safe_open(checkpoint, framework="pt") as file:
        content = json.loads(file.metadata()["memlaw"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del content["identity"][setting]
    save_file(tensors, checkpoint, metadata={"format": "pt", "memlaw": json.dumps(content)})


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["dropout", "betas"])
def test_a_checkpoint_from_before_a_setting_existed_had_its_default(
    llama, phone_book, texts, tmp_path, setting
):
    out, settings = tmp_path / "out", {"model": str(llama), "rank": 1, **texts}
    memlaw.write(phone_book, out, max_epochs=1, **settings)
    _without(out / "checkpoint.safetensors", setting)
    other = {"dropout": 0.1, "betas": (0.8, 0.9)}[setting]
    with pytest.raises(memlaw.MemlawError, match=f"another {setting}"):
        memlaw.write(phone_book, out, max_epochs=2, resume=True, **settings, **{setting: other})
    assert memlaw.write(phone_book, out, max_epochs=2, resume=True, **settings).epochs == 2


def test_every_objective_that_can_be_asked_for_is_there():
    assert set(OBJECTIVES) == set(typing.get_args(choices.Objective))


NAMES = json.loads(
    (Path(__file__).parents[1] / "recorded" / "names.json").read_text(encoding="utf-8")
)
# What went without a successor of that name: files' names that `model.formats` keeps to itself, and
# what is another function now.
GONE = {
    "adapters": {"PEFT_CONFIG", "PEFT_WEIGHTS", "PROBE_CONFIG", "PROBE_WEIGHTS"},
    "cached": {"cached_or_plain"},  # train.preparation.make_engine
    "certificate": {"DAMAGE_TOLERANCE_NATS"},  # measure.damage.TOLERANCE_NATS
    "law": {"Cell"},  # CellRow
    # Whitener and separate_terms take the moments themselves; quadratic_penalty
    "precondition": {"Statistics", "measure_statistics", "retention_penalty"},
}


@pytest.mark.filterwarnings("ignore:memlaw:DeprecationWarning")
@pytest.mark.parametrize("module", NAMES)
def test_every_public_name_of_version_0_1_is_still_found(module):
    found = importlib.import_module(f"memlaw.{module}")
    for name in set(NAMES[module]) - GONE.get(module, set()):
        assert not inspect.ismodule(getattr(found, name)), name


def test_public_functions_are_the_ones_they_were():
    from memlaw.law import plan_rank
    from memlaw.measure.session import audit

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert importlib.import_module("memlaw.plan").plan_rank is plan_rank
        assert importlib.import_module("memlaw.check").audit is audit is memlaw.audit


def test_a_probes_observer_of_version_0_1_is_told_of_its_epochs():
    from memlaw.probe import ProbeObserver

    class Notes(ProbeObserver):
        def epoch(self, specs, step, steps, nll_nats):
            self.seen = (specs, step, steps, nll_nats)

    notes = Notes()
    notes.steps([], 3, 12, 0.5)
    assert notes.seen == ([], 3, 12, 0.5)


def test_an_old_name_says_where_its_names_are_now(monkeypatch):
    monkeypatch.delitem(sys.modules, "memlaw.plan", raising=False)
    with pytest.warns(DeprecationWarning, match=r"memlaw\.plan is in memlaw\.law\.plan, .* now"):
        import memlaw.plan
    with pytest.raises(AttributeError, match="no attribute 'teapot'"):
        _ = memlaw.plan.teapot


def test_no_old_name_hides_a_room():
    rooms = {path.stem for path in Path(memlaw.__path__[0]).iterdir()}
    assert not set(moved.MOVED) & rooms
    for modules in moved.MOVED.values():
        assert all(importlib.util.find_spec(f"memlaw.{module}") for module in modules)


def test_an_alias_of_an_objective_is_understood_in_a_config_made_by_hand(llama, phone_book, texts):
    from memlaw.data import encode
    from memlaw.model import Adapter, load_model, resolve_sites
    from memlaw.train import Learner

    base = load_model(llama)
    sites = resolve_sites(base.model, "down_proj", "auto")
    records = [memlaw.Record(prompt=p, completion=c, id=p) for p, c in phone_book]
    examples = encode(records, base.tokenizer, format="chat")
    config = TrainConfig(objective="sliding", retention=0.0)
    learner = Learner(Adapter(sites, rank=1, seed=0), examples, config)
    assert type(learner.objective) is OBJECTIVES["memft_window"]


def test_the_bound_of_every_kind_of_harm_is_among_the_settings():
    from memlaw.measure.harm import KINDS
    from memlaw.settings.write import BOUNDS, FREE_TO_CHANGE

    bounds = {kind.bound for kind in KINDS.values() if kind.bound}  # generality has none
    assert bounds <= set(BOUNDS) <= set(FREE_TO_CHANGE)
