"""What was trained and written by earlier versions: the same numbers, and still readable.

`recorded/record.py` says how `trajectories.json` was made; `recorded/folders` was written by
version 0.1.0 at commit bcf9a59, and only the absolute path of the model was cut to `model`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import memlaw
from memlaw.probe.run import probe
from memlaw.settings.probe import ProbeConfig

HERE = Path(__file__).parent / "recorded"
FOLDERS = HERE / "folders"
TEXTS = {"retain": "data/retain.txt", "damage_text": "data/damage_text.txt"}


@pytest.fixture(autouse=True)
def at_the_recorded_data(monkeypatch):
    monkeypatch.chdir(HERE)


def _close(found, recorded):
    """The same but for rounding, hashes aside: for machines whose arithmetic is another."""
    if isinstance(recorded, dict):
        assert found.keys() == recorded.keys()
        for key in recorded.keys() - {"arithmetic", "adapter"}:
            _close(found[key], recorded[key])
    elif isinstance(recorded, list):
        for pair in zip(found, recorded, strict=True):
            _close(*pair)
    elif isinstance(recorded, float):
        assert found == pytest.approx(recorded, rel=1e-2, abs=1e-3)
    elif not isinstance(recorded, int):
        assert found == recorded


@pytest.mark.slow
def test_trainings_give_the_recorded_numbers():
    done = subprocess.run([sys.executable, "record.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    recorded = json.loads(Path("trajectories.json").read_text(encoding="utf-8"))
    if found["arithmetic"] != recorded["arithmetic"]:
        _close(found, recorded)
        return
    for kind in ("writes", "resumed", "probes"):
        for name, numbers in recorded[kind].items():
            assert found[kind][name] == numbers, name
    assert found == recorded


def test_a_certificate_written_before_holds():
    check = memlaw.check_certificate(
        FOLDERS / "finished" / "certificate.json", "data/book.jsonl", model="model"
    )
    assert check.holds, check.mismatches
    assert check.damage is not None


@pytest.mark.parametrize("folder", ["finished", "unfinished"])
def test_an_adapter_written_before_is_audited_as_then(folder):
    then = json.loads((FOLDERS / folder / "certificate.json").read_text(encoding="utf-8"))
    found = memlaw.audit("data/book.jsonl", adapter=FOLDERS / folder, model="model")
    assert found.n_certified == then["n_certified"]
    for now, before in zip(found.records, then["records"], strict=True):
        assert now.sha256 == before["sha256"]
        assert now.min_p == pytest.approx(before["min_p"], abs=1e-4)


def test_an_adapter_written_before_answers():
    assert memlaw.ask(FOLDERS / "finished", "Li Na:", model="model").text == "031415"


def test_cells_stored_before_are_found_again(tmp_path):
    store = shutil.copytree(FOLDERS / "probe", tmp_path / "probe")
    config = ProbeConfig(
        model="model", **TEXTS, ranks=(1, 2), lengths=(6,), steps=12, dtype="float32"
    )
    result = probe(store, config)
    assert (len(result.cells), result.n_run, result.n_failed) == (2, 0, 0)


def test_a_report_is_made_of_folders_written_before(tmp_path):
    from memlaw.report import make_report

    names = ("finished", "unfinished", "probe")
    (page,) = make_report([FOLDERS / name for name in names], tmp_path / "report.html")
    text = page.read_text(encoding="utf-8")
    assert "Jerry Becerra:" in text
    for name in names[:2]:
        assert name in text


def test_a_finished_folder_is_not_written_over():
    with pytest.raises(memlaw.MemlawError, match="finished run"):
        memlaw.write("data/book.jsonl", FOLDERS / "finished", model="model", resume=True)
