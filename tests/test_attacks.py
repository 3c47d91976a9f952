"""Every attempt in `attacks/` is held off."""

import importlib
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ATTACKS = HERE.parent / "attacks"
NAMES = sorted(p.stem for p in ATTACKS.glob("*.py") if p.stem not in ("common", "run"))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_held_off(name, tmp_path, monkeypatch):
    if name == "markup_in_reports":
        pytest.importorskip("altair")
    monkeypatch.syspath_prepend(str(ATTACKS))
    monkeypatch.chdir(HERE / "recorded")
    assert importlib.import_module(name).attempt(tmp_path)


def test_an_attempt_that_comes_through_is_told(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(ATTACKS))
    monkeypatch.setattr(sys, "path", [*sys.path])
    run, common = importlib.import_module("run"), importlib.import_module("common")

    def comes_through(place):
        common.require(False, "it is open")

    monkeypatch.setattr(importlib.import_module("pickles"), "attempt", comes_through)
    monkeypatch.chdir(tmp_path)
    assert run.main(["pickles"]) == 1
    assert "BROKEN pickles: it is open" in capsys.readouterr().out
