"""One process at a time in a folder, whatever became of those before."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from memlaw.core import locks
from memlaw.core.errors import OutputError
from memlaw.core.locks import LOCK_FILE, locked

_HOLDS = """
import sys
from pathlib import Path
from memlaw.core.locks import locked
with locked(Path(sys.argv[1]), make=True):
    print("has it", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock of `tmp_path / "out"`."""
    args = [sys.executable, "-c", _HOLDS, str(tmp_path / "out")]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"has it\n"
        yield process
        process.kill()


def test_who_is_refused_is_told_by_whom_and_can_come_when_that_one_has_died(holder, tmp_path):
    out, who = tmp_path / "out", f"process {holder.pid} on host {socket.gethostname()}"
    with pytest.raises(OutputError, match=who), locked(out, make=True):
        pass
    assert (out / LOCK_FILE).is_file()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (out / LOCK_FILE).is_file()  # the dead one's note means nothing
    with locked(out):
        assert json.loads((out / LOCK_FILE).read_text())["process"] == os.getpid()
    assert list(out.iterdir()) == []


def test_no_clock_is_asked(holder, tmp_path):
    out = tmp_path / "out"
    for time in (0, 2**33):  # 1970, and 2242
        os.utime(out, (time, time))
        os.utime(out / LOCK_FILE, (time, time))
        with pytest.raises(OutputError, match="another process"), locked(out):
            pass


def test_a_folder_that_was_made_for_nothing_is_removed_again(tmp_path):
    out = tmp_path / "a" / "b"
    with locked(out, make=True):
        assert out.is_dir()
    assert list(tmp_path.iterdir()) == []
    with locked(out, make=True):
        (out / "file").write_text("x")
    assert [p.name for p in out.iterdir()] == ["file"]


def test_a_folder_that_is_removed_in_the_middle_is_no_trouble_here(tmp_path):
    with locked(tmp_path / "out", make=True):
        shutil.rmtree(tmp_path / "out")


def test_a_note_that_is_a_link_is_neither_followed_nor_believed(tmp_path):
    secret, out = tmp_path / "secret", tmp_path / "out"
    secret.write_text('{"process": 1, "host": "h"}')
    out.mkdir()
    (out / LOCK_FILE).symlink_to(secret)
    with locked(out), pytest.raises(OutputError) as refused, locked(out):
        pass
    assert "on host h" not in str(refused.value)
    assert secret.read_text() == '{"process": 1, "host": "h"}'


@pytest.mark.parametrize("note", ["", "{", "[]", '{"process": "x", "host": "h"}', "[" * 5000])
def test_a_note_that_cannot_be_read_names_nobody(tmp_path, note, monkeypatch):
    monkeypatch.setattr(locks, "_say_who", lambda handle: None)
    (tmp_path / LOCK_FILE).write_text(note)
    told = pytest.raises(OutputError, match=r"by another process\. Wait")
    with locked(tmp_path), told, locked(tmp_path):
        pass


def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    import errno
    import fcntl

    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path), locked(tmp_path):
        pass
