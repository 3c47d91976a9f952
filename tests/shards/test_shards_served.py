"""examples/ask_shards.py, against a server that has an adapter for each shard's name."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import memlaw
from memlaw.shards.loading import BARE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def url(written):
    """A server that answers by the adapter that is asked for, and by no other."""
    loaded = memlaw.load(written)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = {"base": BARE}.get(asked["model"], asked["model"])
            prompt = asked["messages"][-1]["content"]
            (text,) = loaded.generate([prompt], names=[name], max_tokens=12)
            body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def _ask(written, url, prompt):
    done = subprocess.run(
        [sys.executable, "examples/ask_shards.py", str(written), url, "base", prompt],
        cwd=ROOT,
        env=os.environ | {"no_proxy": "*"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.rstrip("\n").split(": ", 1)


@pytest.mark.slow
def test_each_records_prompt_is_asked_of_the_adapter_that_recites_it(written, book, url):
    assert _ask(written, url, book[0][0]) == ["shard-0001", book[0][1]]
    assert _ask(written, url, book[-1][0]) == ["shard-0003", book[-1][1]]
    name, text = _ask(written, url, "What else?")
    assert name == "base"
    assert text not in dict(book).values()
