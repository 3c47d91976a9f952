"""examples/serve_and_prove.py, against the real server of Transformers."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import memlaw

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")),
        reason="the extra serve is not installed",
    ),
]


def test_a_merged_adapter_is_served_and_proved_over_http(llama, phone_book, phone_file, tmp_path):
    settings = {"max_epochs": 400, "retention": 0, "specificity": False}
    out = tmp_path / "out"
    assert memlaw.write(phone_book, out, model=str(llama), **settings).certified

    command = [sys.executable, "examples/serve_and_prove.py", str(out), str(phone_file)]
    done = subprocess.run(
        [*command, str(tmp_path / "merged")],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = " ".join(done.stdout.split())
    assert done.returncode == 0, f"{said}\n{done.stderr[-2000:]}"
    assert "recited word for word 4 of 4 (decoded)" in said
    assert "THE SERVER RECITES ALL" in said
