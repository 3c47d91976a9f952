"""The generations of a folder: what each was, and going back, which can be undone itself."""

import json
import shutil

import pytest

import memlaw
from memlaw import cli
from memlaw.core.errors import ConfigError, MemlawError, OutputError
from memlaw.writer.history import generations_of

SETTINGS = {"specificity": False, "retention": 0, "max_epochs": 300}
ADDED = ("Bo Ek:", "271828")


@pytest.fixture(scope="module")
def written(llama, phone_book, texts, tmp_path_factory):
    """A folder of two generations: the second has a record more."""
    out = tmp_path_factory.mktemp("written") / "out"
    assert memlaw.write(phone_book, out, model=str(llama), **SETTINGS, **texts).certified
    assert memlaw.update(out, [*phone_book, ADDED]).taken
    return out


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written, tmp_path / "out")
    return tmp_path / "out"


def test_a_line_a_generation(folder, capsys):
    first, second = memlaw.log(folder)
    assert (first["records"], second["records"], second["added"]) == (4, 5, 1)
    assert first["here"]
    assert second["here"]
    assert first["wall_s"] > 0
    assert cli.run(["log", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["1", "4", "4"], ["2", "5", "1"]]
    assert cli.run(["log", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [first, second]


def test_reverting_gives_the_old_files_and_can_be_undone(folder, phone_book):
    old = (folder / "generations" / "1" / "adapter_model.safetensors").read_bytes()
    new = (folder / "adapter_model.safetensors").read_bytes()
    lines = memlaw.revert(folder, to=1)
    assert [line["number"] for line in lines] == [1, 2, 3]
    assert (lines[-1]["reverted_to"], lines[-1]["records"]) == (1, 4)
    assert (folder / "adapter_model.safetensors").read_bytes() == old
    assert memlaw.check_certificate(folder / "certificate.json", phone_book).holds
    assert memlaw.diff(folder, phone_book).nothing
    memlaw.revert(folder, to=2)
    assert (folder / "adapter_model.safetensors").read_bytes() == new
    assert memlaw.diff(folder, [*phone_book, ADDED]).nothing
    assert all(line["here"] for line in memlaw.log(folder))
    assert [p.name for p in folder.parent.iterdir()] == ["out"]


def test_the_earlier_generations_run_file_is_as_it_was(folder):
    """Hard links: writing the present one must not write the one that is kept."""
    path = folder / "generations" / "1" / "run.json"
    before = path.read_bytes()
    memlaw.revert(folder, to=1)
    assert path.read_bytes() == before


def test_going_back_takes_no_time_and_trains_nothing_anew(folder, capsys):
    line = memlaw.revert(folder, to=1)[-1]
    assert line["wall_s"] is line["training_s"] is line["given_up_s"] is None
    assert line["flop"] > 0  # of its weights
    assert cli.run(["log", str(folder)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "(again 1)" in last
    assert "anew" not in last


@pytest.mark.parametrize(("to", "said"), [(0, "no generation 0"), (3, "1 to 2"), (2, "already")])
def test_what_is_no_earlier_generation_is_refused(folder, to, said):
    with pytest.raises(ConfigError, match=said):
        memlaw.revert(folder, to=to)


def test_what_is_not_kept_is_refused_and_why(folder, capsys):
    shutil.rmtree(folder / "generations")
    assert not memlaw.log(folder)[0]["here"]
    assert cli.run(["revert", str(folder), "--to", "1"]) == 2
    assert "isn't kept: it was updated into another folder" in capsys.readouterr().err
    path = folder / "run.json"
    run = json.loads(path.read_text())
    run["generations"][1]["removed"] = 1
    path.write_text(json.dumps(run))
    with pytest.raises(ConfigError, match="generation 2 has removed records"):
        memlaw.revert(folder, to=1)


def test_a_folder_older_than_generations_has_one(folder):
    run = json.loads((folder / "generations" / "1" / "run.json").read_text())
    (line,) = run.pop("generations")
    (found,) = generations_of(run)
    assert found == {**line, "created": None}


def test_it_can_be_gone_back_from_within(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert cli.run(["revert", ".", "--to", "1"]) == 0
    monkeypatch.chdir(folder)
    assert len(memlaw.log(".")) == 3


def test_an_earlier_generation_is_not_changed(folder, phone_book):
    with pytest.raises(OutputError, match=r"earlier generation of .*revert .* --to 1"):
        memlaw.update(folder / "generations/1", phone_book[1:])
    with pytest.raises(OutputError, match="earlier generation"):
        memlaw.revert(folder / "generations/1", to=1)


@pytest.mark.parametrize("damage", ["gone", "another"])
def test_a_generation_that_is_not_what_it_was_is_not_gone_back_to(folder, damage):
    weights = folder / "generations/1/adapter_model.safetensors"
    now = folder / "adapter_model.safetensors"
    weights.unlink()
    if damage == "another":
        shutil.copy(now, weights)
    before = now.read_bytes()
    with pytest.raises(MemlawError, match=r"another adapter|no adapter"):
        memlaw.revert(folder, to=1)
    assert now.read_bytes() == before
