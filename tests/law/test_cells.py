"""The probe's store: whole cells or none, and nothing damaged is trusted."""

import dataclasses
import itertools
import json
import os
import random

import pytest

from memlaw.core.errors import DataError, OutputError
from memlaw.law import store as cells_module
from memlaw.law.store import Cell, CellStore, read_cells

CONFIG = {"task": "noise:1", "length": 8, "rank": 1, "seed": 0, "training": {"objective": "sft"}}


def _cell(rank=1, status="success", **changes):
    done = status == "success"
    return Cell(
        config=CONFIG | {"rank": rank} | changes,
        status=status,
        result={"nll": 0.5 / rank} if done else None,
        error=None if done else "Traceback: it broke",
        provenance={"wall_s": 1.5},
        write_tokens=(lambda path: path.write_bytes(b"%d" % os.getpid())) if done else None,
    )


def _store(folder, *cells):
    store = CellStore(folder)
    store.put(cells)
    return store


def test_what_is_put_is_read(tmp_path):
    store = _store(tmp_path, _cell(2), _cell(1))
    rows = read_cells(tmp_path)
    assert [(row["rank"], row["nll"], row["status"]) for row in rows] == [
        (1, 0.5, "success"),
        (2, 0.25, "success"),
    ]
    assert rows[0]["objective"] == "sft"
    assert store.finished([_cell(1).key, _cell(3).key], pytest.fail) == {_cell(1).key}
    assert [path.name for path in tmp_path.iterdir()] == ["cells"]


def test_only_the_cells_that_are_asked_for_are_read(tmp_path):
    _store(tmp_path, _cell(1), _cell(2), _cell(3))
    (tmp_path / "cells" / f"{_cell(3).key}.json").write_text("damaged")
    (row,) = read_cells(tmp_path, pytest.fail, keys={_cell(2).key})
    assert row["rank"] == 2
    with pytest.raises(DataError, match="holds no cells"):
        read_cells(tmp_path, keys=set())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_can_t_be_put_leaves_nothing_behind(tmp_path, error):
    def broken(path):
        path.write_bytes(b"half")
        raise error

    with pytest.raises(error):
        CellStore(tmp_path).put([_cell(1), dataclasses.replace(_cell(2), write_tokens=broken)])
    assert [path.name for path in tmp_path.rglob("*")] == ["cells"]


def test_a_failure_is_a_cell_but_not_a_result(tmp_path):
    store = _store(tmp_path, _cell(1, "failed"))
    (row,) = read_cells(tmp_path)
    assert row["status"] == "failed"
    (content,), _ = store.read()
    assert content["error"] == "Traceback: it broke"
    assert store.finished([_cell(1).key], pytest.fail) == set()
    store.put([_cell(1)])
    assert read_cells(tmp_path)[0]["status"] == "success"


def _damaged(path, how):
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "edited":
        assert '"nll": 0.5' in path.read_text()
        path.write_text(path.read_text().replace('"nll": 0.5', '"nll": 0.4'))
    elif how == "not an object":
        path.write_text("[1, 2]")
    elif how == "renamed":
        path.rename(path.with_name("0" * 64 + ".json"))
    elif how == "another cell's content":
        content = json.loads(data)
        del content["sha256"]
        content["config"]["rank"] = 7
        path.write_text(cells_module._sealed(content))


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "edited", "not an object", "another cell's content"]
)
def test_a_damaged_cell_is_reported_and_not_trusted(tmp_path, how):
    store = _store(tmp_path, _cell(1), _cell(2))
    _damaged(tmp_path / "cells" / f"{_cell(1).key}.json", how)
    said = []
    assert store.finished([_cell(1).key, _cell(2).key], said.append) == {_cell(2).key}
    assert len(said) == 1
    assert "not trusted" in said[0]
    assert "run again" in said[0]
    said.clear()
    assert [row["rank"] for row in read_cells(tmp_path, said.append)] == [2]
    assert "not trusted" in said[0]


def test_a_renamed_cell_is_not_trusted(tmp_path):
    store = _store(tmp_path, _cell(1))
    _damaged(tmp_path / "cells" / f"{_cell(1).key}.json", "renamed")
    assert store.finished([_cell(1).key], pytest.fail) == set()
    said = []
    with pytest.raises(DataError, match="holds no cells"):
        read_cells(tmp_path, said.append)
    assert "its name belongs to another cell" in said[0]


@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_cell_whose_tokens_are_damaged_is_run_again(tmp_path, how):
    store = _store(tmp_path, _cell(1))
    tokens = tmp_path / "cells" / f"{_cell(1).key}.parquet"
    tokens.write_bytes(b"other") if how == "changed" else tokens.unlink()
    said = []
    assert store.finished([_cell(1).key], said.append) == set()
    assert "not trusted" in said[0]


@pytest.mark.slow
def test_killed_at_any_step_of_putting_leaves_all_or_nothing(tmp_path):
    """A child is killed at its n-th touch of the disk, for every n there is."""
    outcomes = set()
    for n in range(100):
        folder = tmp_path / str(n)
        child = os.fork()
        if child == 0:
            _die_at_touch(n)
            _store(folder, _cell(1), _cell(2), _cell(3))
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        store = CellStore(folder)
        before = [row["rank"] for row in read_cells(folder)] if _any_cells(store) else []
        store.recover()
        after = [row["rank"] for row in read_cells(folder)] if _any_cells(store) else []
        assert before == after
        assert after in ([], [1, 2, 3])
        kept = [p.name for p in folder.iterdir() if not p.name.startswith(".work-")]
        assert kept == ["cells"]
        outcomes.add((code, len(after)))
        if code == 0:
            break
    assert outcomes == {(9, 0), (9, 3), (0, 3)}


def _die_at_touch(n):
    """From now on, count what renames, flushes or changes a file, and die at the n-th."""
    touches = itertools.count()
    for name in ("replace", "fsync", "chmod"):
        usual = getattr(os, name)

        def counted(*args, usual=usual):
            if next(touches) == n:
                os._exit(9)
            return usual(*args)

        setattr(os, name, counted)


def _any_cells(store):
    return bool(store.read()[0])


def test_the_work_of_a_running_process_is_left_alone(tmp_path):
    host = cells_module.socket.gethostname()
    gone = 2**22 + 1  # no process has such a number
    names = {
        "mine": f"{host}-{os.getpid()}-x",
        "another host's": f"elsewhere-{gone}-x",
        "of a host whose name begins alike": f"{host}-1-{gone}-x",
        "young": f"{host}-{gone}-x",
        "left behind": f"{host}-{gone}-y",
    }
    for name, path in names.items():
        folder = tmp_path / f"{cells_module._WORK}{path}"
        folder.mkdir()
        if name != "young":
            os.utime(folder, (0, 0))
    CellStore(tmp_path).recover()
    left = {name for name, path in names.items() if (tmp_path / f".work-{path}").is_dir()}
    assert left == set(names) - {"left behind"}


def test_two_processes_that_put_the_same_cells_don_t_harm_each_other(tmp_path):
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            store = CellStore(tmp_path)
            for rank in range(1, 40):
                store.recover()
                store.put([_cell(rank), _cell(rank, seed=1)])
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children] == [0, 0]
    rows = read_cells(tmp_path, pytest.fail)
    assert [(r["rank"], r["seed"]) for r in rows] == [(n, s) for n in range(1, 40) for s in (0, 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["cells"]


def test_a_failure_doesn_t_undo_what_another_process_found(tmp_path):
    _store(tmp_path, _cell(1))
    CellStore(tmp_path).put([_cell(1, "failed"), _cell(2)])
    assert [row["status"] for row in read_cells(tmp_path, pytest.fail)] == ["success", "success"]
    assert CellStore(tmp_path).finished([_cell(1).key], pytest.fail) == {_cell(1).key}


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    store = _store(tmp_path, _cell(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        store.put([_cell(2)])
    monkeypatch.undo()
    assert [row["rank"] for row in read_cells(tmp_path)] == [1]


def test_no_store(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        read_cells(tmp_path / "nowhere")
    CellStore(tmp_path / "nowhere").recover()
    assert not (tmp_path / "nowhere").exists()


def test_keys_tell_every_setting_apart():
    draw = random.Random(0)
    configs = [
        CONFIG | {"rank": rank, "seed": seed, "training": {"learning_rate": rate}}
        for rank in range(5)
        for seed in range(5)
        for rate in (1e-2, 1e-3, draw.random())
    ]
    keys = {Cell(config=c, status="failed", provenance={}).key for c in configs}
    assert len(keys) == len(configs)
