"""Memory stays within what is set, measured on the process itself."""

import json
import os
import subprocess
import sys

import pytest
import torch

from memlaw.core.errors import ConfigError
from memlaw.train.activations import Activations

# Not ru_maxrss: a child process starts with its parent's.
PEAK = """
from pathlib import Path

def peak_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
"""

HEAD = """
import json, torch
from memlaw.model.head import head_losses

torch.set_num_threads(2)
n, vocabulary, width = 10_000, 150_000, 8
row_bytes = 2 * vocabulary * 2
generator = torch.Generator().manual_seed(0)
weight = (torch.randn(vocabulary, width, generator=generator) * 0.1).bfloat16()
hidden = torch.randn(n, width, generator=generator).bfloat16().requires_grad_()
targets = torch.randint(vocabulary, (n,), generator=generator)
losses = head_losses(
    lambda h: h @ weight.T,
    hidden,
    targets,
    dense=torch.zeros(n, dtype=torch.bool),
    max_rows=int(512e6 / row_bytes),
)
losses.backward((torch.arange(n) % 4 == 0) / n)
found = {"nll": float(losses.nll.mean()), "norm": float(hidden.grad.norm())}
print(json.dumps(found | {"peak_mb": peak_mb()}))
"""

CACHE = """
import json, sys, torch
from memlaw.train.cached import Activations

n, width, on_disk = 400_000, 512, sys.argv[1] == "disk"
before = peak_mb()
rows = Activations(n, width, torch.bfloat16, torch.device("cpu"), on_disk=on_disk)
for start in range(0, n, 4000):
    places = torch.arange(start, start + 4000)
    rows.write(places, (places[:, None] % 251).expand(-1, width).bfloat16())
total = 0.0
for start in range(0, n, 4000):
    places = torch.arange(start, start + 4000)
    total += float(rows.read(places)[:, 7].float().sum())
found = {"total": total, "expected": float(sum(i % 251 for i in range(n)))}
print(json.dumps(found | {"grown_mb": peak_mb() - before}))
"""


def _run(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", PEAK + script, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory as Linux does")
def test_ten_thousand_tokens_of_a_vocabulary_of_150_000_fit_in_two_gigabytes():
    found = _run(HEAD)
    assert found["peak_mb"] < 2000
    assert found["nll"] == pytest.approx(11.95, abs=0.1)  # ln 150,000, and a little
    assert 0 < found["norm"] < 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory as Linux does")
def test_activations_on_disk_stay_out_of_memory():
    in_memory, on_disk = _run(CACHE, "memory"), _run(CACHE, "disk")
    assert on_disk["total"] == in_memory["total"] == in_memory["expected"]
    assert in_memory["grown_mb"] > 380  # 400 MB of activations
    assert on_disk["grown_mb"] < 60


def test_a_full_disk_is_said_before_anything_is_written(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(
        ConfigError, match=r"no room for 0 MB .*space left.*TMPDIR, or raise --cache"
    ):
        Activations(10, 4, torch.float32, torch.device("cpu"), on_disk=True)
