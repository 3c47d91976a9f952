"""examples/trl_memft.py does what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the extra trl is not installed")

import memlaw

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_example_ends_at_a_certificate_that_holds(llama, phone_file, tmp_path):
    command = [sys.executable, "examples/trl_memft.py"]
    done = subprocess.run(
        [*command, str(phone_file), str(tmp_path), str(llama), "150"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4 of 4 records are certified" in done.stdout
    path = tmp_path / "recall/certificate.json"
    assert json.loads(path.read_text())["certified"]
    assert memlaw.check_certificate(path, phone_file).holds


def test_the_readme_shows_the_lines_of_the_example():
    example = (ROOT / "examples/trl_memft.py").read_text(encoding="utf-8")
    lines = [line for line in example.splitlines() if line.startswith("trainer")]
    assert len(lines) == 3
    shown = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in lines:
        assert line.replace("watch := ", "").replace(", every=5", "") in shown
