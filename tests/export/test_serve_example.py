"""examples/serve_and_prove.py, against the real server of Transformers."""

import importlib.util
import json
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

    def prove(records, dest):
        command = [sys.executable, "examples/serve_and_prove.py", str(out), str(records), str(dest)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(tmp_path / "hub")}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )

    done = prove(phone_file, tmp_path / "merged")
    said = " ".join(done.stdout.split())
    assert done.returncode == 0, f"{said}\n{done.stderr[-2000:]}"
    assert "recited word for word 4 of 4 (decoded)" in said
    assert "THE SERVER RECITES ALL" in said
    # The proof has teeth: a record that was never written is not recited.
    other = tmp_path / "other.jsonl"
    row = {"prompt": "Nobody Known:", "completion": "5050"}
    other.write_text(phone_file.read_text(encoding="utf-8") + json.dumps(row) + "\n")
    done = prove(other, tmp_path / "again")
    said = " ".join(done.stdout.split())
    assert done.returncode == 1
    assert "recited word for word 4 of 5 (decoded)" in said
    assert "THE SERVER DOES NOT RECITE ALL" in said
