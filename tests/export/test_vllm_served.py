"""The export for vLLM on vLLM itself: `MEMLAW_VLLM=path/to/vllm pytest tests/export`.

It lives in an environment of its own, as it wants other versions than the rest.
"""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

import memlaw
from memlaw.export.run import export
from memlaw.measure.endpoint import audit_endpoint
from memlaw.settings.endpoint import EndpointConfig

VLLM = os.environ.get("MEMLAW_VLLM")
pytestmark = [
    pytest.mark.minutes,
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM, reason="MEMLAW_VLLM doesn't name a vllm executable"),
]
SMALL = ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4"]


def test_vllm_recites_what_was_exported_under_the_adapters_name_alone(llama, phone_book, tmp_path):
    settings = {"max_epochs": 400, "retention": 0, "specificity": False, "dtype": "float32"}
    how = settings | {"robust_to": ("peft-bf16",)}
    assert memlaw.write(phone_book, tmp_path / "out", model=str(llama), **how).succeeded
    to = {"to": "peft-vllm", "save_dtype": "bfloat16"}
    assert export(tmp_path / "out", tmp_path / "vllm", phone_book, **to).recites
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    card = (tmp_path / "vllm/README.md").read_text()
    rank = card.split("--max-lora-rank ")[1].split()[0]
    lora = ["--enable-lora", "--max-lora-rank", rank, "--lora-modules", f"records={tmp_path}/vllm"]
    where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "base"]
    server = subprocess.Popen(
        [VLLM, "serve", str(llama), *lora, *where, *SMALL],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )
    try:
        _wait_for(server, port)
        url = f"http://127.0.0.1:{port}/v1"
        usual = {"endpoint": url, "timeout": 120, "concurrency": 2}
        served = audit_endpoint(phone_book, EndpointConfig(name="records", **usual))
        assert served.passed
        assert served.n_over == len(phone_book)
        bare = audit_endpoint(phone_book, EndpointConfig(name="base", **usual))
        assert bare.n_recited == 0
    finally:
        server.terminate()
        server.wait(60)


def _wait_for(server, port):
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except (urllib.error.URLError, ConnectionError):
            assert server.poll() is None, "vllm serve ended by itself"
            time.sleep(1)
    raise AssertionError("vllm serve doesn't answer")
