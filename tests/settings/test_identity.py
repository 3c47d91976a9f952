"""What a result is known by, and what may be added without giving it another name."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import typing
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


@pytest.mark.parametrize(
    "line",
    [
        "from memlaw.plan import plan_rank",
        "from memlaw.recall_law import RecallLaw",
        "from memlaw.cells import read_cells",
        "from memlaw.records import Record, read_records",
        "from memlaw.errors import MemlawError",
        "from memlaw.check import audit, ask, check_certificate",
        "from memlaw.bank import AdapterBank",
        "from memlaw.writer import write, WriteResult, Observer",
        "from memlaw.law import MemoryLaw",
        "from memlaw.settings import WriteConfig",
        "from memlaw.probe import ProbeConfig, Prober, probe",
    ],
)
def test_names_of_version_0_1_still_import(line):
    subprocess.run([sys.executable, "-c", line], check=True)


def test_an_old_name_says_where_its_names_are_now(monkeypatch):
    monkeypatch.delitem(sys.modules, "memlaw.plan", raising=False)
    with pytest.warns(DeprecationWarning, match=r"memlaw\.plan is memlaw\.law now"):
        import memlaw.plan
    with pytest.raises(AttributeError, match=r"now 'memlaw\.law', has no attribute 'teapot'"):
        _ = memlaw.plan.teapot


def test_no_old_name_hides_a_room():
    rooms = {path.stem for path in Path(memlaw.__path__[0]).iterdir()}
    assert not {old.removeprefix("memlaw.") for old in moved.NOW} & rooms
    assert all(importlib.util.find_spec(new) for new in moved.NOW.values())
