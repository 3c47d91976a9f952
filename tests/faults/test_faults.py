"""A few of the faults that `benchmarks/faults.py` has thousands of: some of each kind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from injecting import MODES, Cage, compiled

INJECTING = Path(__file__).parent / "injecting.py"
COMMANDS = ("write", "update")


@pytest.fixture(scope="module")
def n_limits():
    """How many limits of memory are tried: none where that isn't ours to limit."""
    try:
        with Cage():
            return 3
    except OSError:
        return 0


@pytest.fixture(scope="module")
def seen(tmp_path_factory, n_limits):
    """A line for each fault."""
    place = tmp_path_factory.mktemp("faults")
    shim = compiled(place)
    if shim is None:
        pytest.skip("it needs Linux and a C compiler")
    (work := place / "work").mkdir()
    words = [sys.executable, str(INJECTING), str(work), "--shim", str(shim), "--every", "31"]
    words += ["--commands", *COMMANDS, "--moments", "3", "--limits", str(n_limits)]
    environment = os.environ | {"LD_PRELOAD": str(shim), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_after_each_fault_the_folder_is_the_old_one_or_the_new_and_the_next_run_is_as_ever(seen):
    assert not [line for line in seen if line["wrong"]]


@pytest.mark.slow
def test_faults_were_met(seen, n_limits):
    assert {line["command"] for line in seen} == set(COMMANDS)
    assert {line["mode"] for line in seen} == {
        *MODES,
        "from outside",
        *(["starved"] if n_limits else []),
    }
    starved = {line["status"] for line in seen if line["mode"] == "starved"}
    assert 9 in starved or not n_limits
    assert {line["state"] for line in seen} >= {"old", "new", "begun"}
    assert {line["status"] for line in seen} >= {0, 2, 9}


@pytest.mark.slow
def test_what_a_command_says_of_a_fault_is_no_fault_of_its_own(seen):
    told = [line for line in seen if line["status"] not in (0, 9)]
    assert told
    assert not [line["said"] for line in told if "fault of memlaw's own" in line["said"]]
