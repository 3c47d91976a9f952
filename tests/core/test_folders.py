"""Whole folders that are exchanged in one step, by one process at a time."""

import os
import socket
import subprocess
import sys

import pytest

from memlaw.core import folders
from memlaw.core.errors import OutputError
from memlaw.core.folders import exchange, folder_beside, linked_tree, restore
from memlaw.core.locks import locked


def _folder(path, text):
    path.mkdir()
    (path / "a").write_text(text)
    return path


def _texts(*paths):
    return [(path / "a").read_text() for path in paths]


@pytest.mark.parametrize("at_once", [True, False])
def test_two_folders_change_places(tmp_path, monkeypatch, at_once):
    if not at_once:
        monkeypatch.setattr(folders, "_swapped", lambda one, other: False)
    old, new = _folder(tmp_path / "old", "old"), _folder(tmp_path / "new", "new")
    exchange(new, old)
    assert _texts(old, new) == ["new", "old"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]


def test_killed_between_two_renames_the_old_folder_comes_back(tmp_path, monkeypatch):
    old, new = _folder(tmp_path / "old", "old"), _folder(tmp_path / "new", "new")
    monkeypatch.setattr(folders, "_swapped", lambda one, other: False)
    usual, done = os.rename, []

    def killed(*names):
        if done:
            raise KeyboardInterrupt
        done.append(usual(*names))

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        exchange(new, old)
    assert not old.exists()
    monkeypatch.setattr(os, "rename", usual)
    restore(old)
    assert _texts(old) == ["old"]


def test_restoring_changes_nothing_where_all_is_well(tmp_path):
    old = _folder(tmp_path / "old", "old")
    _folder(tmp_path / ".old.last", "older")
    restore(old)
    assert _texts(old) == ["old"]


def test_a_second_process_is_refused_and_a_third_comes_later(tmp_path):
    script = (
        "import sys; from pathlib import Path; from memlaw.core.locks import locked\n"
        "with locked(Path(sys.argv[1])): pass"
    )
    args = [sys.executable, "-c", script, str(tmp_path)]
    with locked(tmp_path):
        done = subprocess.run(args, capture_output=True, text=True)
        assert done.returncode == 1
        who = f"(process {os.getpid()} on host {socket.gethostname()})"
        assert f"is being written by another process {who}. Wait" in done.stderr
    assert subprocess.run(args).returncode == 0


def test_a_folder_that_was_exchanged_meanwhile_is_not_locked(tmp_path, monkeypatch):
    old, new = _folder(tmp_path / "old", "old"), _folder(tmp_path / "new", "new")
    usual = os.open

    def opened(path, *rest):
        handle = usual(path, *rest)
        if path == old and _texts(old) == ["old"]:
            exchange(new, old)
        return handle

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(OutputError, match="another process"), locked(old):
        pass


def test_the_folder_beside_is_gone_afterwards_and_so_are_leftovers(tmp_path):
    out = _folder(tmp_path / "out", "old")
    _folder(tmp_path / ".out.next-killed", "half")
    other = _folder(tmp_path / ".outer.next-x", "another's")
    with folder_beside(out) as work:
        assert work.parent == tmp_path
        assert not (tmp_path / ".out.next-killed").exists()
        (work / "a").write_text("new")
        exchange(work, out)
    assert _texts(out, other) == ["new", "another's"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".outer.next-x", "out"]


def test_a_linked_copy_shares_bytes_and_leaves_a_part_out(tmp_path):
    old = _folder(tmp_path / "old", "old")
    _folder(old / "within", "w")
    _folder(old / "but", "not this")
    linked_tree(old, tmp_path / "copy", but="but")
    assert _texts(tmp_path / "copy", tmp_path / "copy" / "within") == ["old", "w"]
    assert not (tmp_path / "copy" / "but").exists()
    assert (tmp_path / "copy" / "a").stat().st_nlink == 2


def test_the_work_of_a_process_that_lives_is_left_alone(tmp_path):
    """Two folders may be updated into one new one; whoever is second isn't the first one's end."""
    with folder_beside(tmp_path / "new") as first, folder_beside(tmp_path / "new") as second:
        assert first.is_dir()
        assert second.is_dir()
        assert first != second


def test_a_new_folder_is_as_open_as_others(tmp_path):
    (tmp_path / "usual").mkdir()
    with folder_beside(tmp_path / "new") as work:
        assert work.stat().st_mode == (tmp_path / "usual").stat().st_mode
