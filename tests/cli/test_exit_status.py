"""What nobody foresaw ends in status 3, one line and a file; status 1 is kept for certificates."""

import functools
import io
import re
import sys
import tempfile
import types
from pathlib import Path

import pytest

from memlaw import cli
from memlaw.core.errors import DataError


@pytest.fixture
def raised(monkeypatch, tmp_path, capfd):
    """`raised(error)`: status, standard error and report of a command that raises `error`."""
    make = functools.partial(tempfile.mkstemp, dir=tmp_path)
    monkeypatch.setattr("memlaw.cli.dispatch.tempfile", types.SimpleNamespace(mkstemp=make))

    def run(error, *args):
        def fail(args):
            raise error

        monkeypatch.setattr("memlaw.cli.fit.run", fail)
        status = cli.run(["fit", *args])
        reports = list(tmp_path.glob("memlaw-error-*"))
        return status, capfd.readouterr().err, [path.read_text("utf-8") for path in reports]

    return run


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied\nsecond line"),
        IndexError("index out of range in self"),
        MemoryError(),
        FileNotFoundError(2, "No such file or directory"),
        UnicodeEncodeError("ascii", "ü\ud800", 0, 1, "ordinal not in range"),
        RecursionError("maximum recursion depth exceeded"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_nobody_foresaw_is_status_3_in_one_line_with_a_file(raised, error):
    status, err, (report,) = raised(error, "a folder")
    assert status == 3
    assert err.count("\n") == 1
    assert err.startswith(f"memlaw: {type(error).__name__}: ")
    (path,) = re.findall(r"with (\S+memlaw-error-\S+\.txt)", err)
    assert Path(path).read_text("utf-8") == report
    assert "memlaw fit 'a folder'" in report
    assert "Traceback (most recent call last)" in report
    assert "fail" in report
    assert "second line" not in err


def test_without_a_folder_for_the_file_the_traceback_is_printed(raised, monkeypatch, tmp_path):
    make = functools.partial(tempfile.mkstemp, dir=tmp_path / "none")
    monkeypatch.setattr("memlaw.cli.dispatch.tempfile.mkstemp", make)
    status, err, reports = raised(ValueError("odd"))
    assert (status, reports) == (3, [])
    assert "Traceback (most recent call last)" in err
    assert "with the traceback above" in err


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(28, "No space left on device", "a.bin"), "a.bin (No space left on device)"),
        (OSError(5, "Input/output error"), "(Input/output error)"),
        (OSError(36, "File name too long", "a.bin"), "a.bin (File name too long)"),
        # as safetensors and tokenizers say it
        (Exception("I/O error: No space left on device (os error 28)"), "(No space left on dev"),
    ],
)
def test_what_the_machine_refuses_is_no_fault_of_this_program(raised, error, why):
    status, err, reports = raised(error)
    assert (status, reports) == (2, [])
    assert err.startswith("memlaw: the system refuses a file")
    assert why in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "expected"), [(DataError("a bad row"), 2), (KeyboardInterrupt(), 130)]
)
def test_what_was_foreseen_keeps_its_status_and_leaves_no_file(raised, error, expected):
    status, err, reports = raised(error)
    assert (status, reports) == (expected, [])
    assert "report" not in err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_lacks_signs_is_no_fault(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr("memlaw.cli.fit.run", lambda args: print("█ ΔNLL") or 0)
    assert cli.run(["fit"]) == 0
    assert raw.getvalue().decode("ascii").split()[0] == r"\u2588"
