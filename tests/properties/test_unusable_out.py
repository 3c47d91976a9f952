"""An output folder that can't be used is refused before any work, and nothing is made."""

import errno
import shutil
from pathlib import Path

import pytest

import memlaw
from memlaw.core.errors import OutputError
from memlaw.export.run import export
from memlaw.probe import ProbeConfig, probe
from memlaw.shards.writing import write_shards
from memlaw.writer.updating import update

RECORDS = [("Li Na:", "0314")]
FINISHED = Path(__file__).parents[1] / "recorded/folders/finished"
WRITES = {
    "write": lambda out, folder: memlaw.write(RECORDS, out),
    "write, resumed": lambda out, folder: memlaw.write(RECORDS, out, resume=True),
    "write --shards": lambda out, folder: write_shards(RECORDS, out),
    "update -o": lambda out, folder: update(folder, RECORDS, new=out, forget="rewrite"),
    "export": lambda out, folder: export(folder, out, RECORDS),
    "probe": lambda out, folder: probe(out, ProbeConfig()),
}


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run."""
    return Path(shutil.copytree(FINISHED, tmp_path / "finished"))


@pytest.fixture(params=["in a file", "where no file can be", "read-only", "too long"])
def unusable(request, tmp_path, monkeypatch):
    """A folder that can't be made, or not be filled."""
    if request.param == "in a file":
        (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
        return tmp_path / "notes.txt" / "deep" / "out"
    if request.param == "where no file can be":
        if not Path("/proc/self").is_dir():
            pytest.skip("this system has no /proc")
        return Path("/proc/memlaw/out")
    if request.param == "too long":
        return tmp_path / ("a" * 300)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    return tmp_path / "new" / "out"


@pytest.mark.parametrize("name", WRITES)
def test_it_is_refused_before_any_work(unusable, finished, tmp_path, monkeypatch, name):
    monkeypatch.setattr("memlaw.model.base.locate", lambda *_: pytest.fail("a model was loaded"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=r"no folder can be made or filled there\."):
        WRITES[name](unusable, finished)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [name for name in WRITES if name != "write, resumed"])
def test_one_that_can_be_used_is_made_only_with_something_in_it(
    finished, tmp_path, monkeypatch, name
):
    class Loaded(Exception):
        pass

    def load(*_):
        raise Loaded

    monkeypatch.setattr("memlaw.model.base.locate", load)
    with pytest.raises(Loaded):
        WRITES[name](tmp_path / "out", finished)
    assert [path.name for path in tmp_path.iterdir()] == ["finished"]
