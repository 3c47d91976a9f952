"""A key in the environment or in a URL that ends up in a file, or goes to another server.

Keys are read from MEMLAW_ENDPOINT_KEY, and by Hugging Face's library from HF_TOKEN. Tried: a
server that sends its visitors elsewhere, to see who is given the key; a URL that holds one;
everything that an audit and a fault that nobody foresaw write.
"""

import contextlib
import http.server
import io
import os
import tempfile
from pathlib import Path
from unittest import mock

from common import BOOK, require, serving

KEY = "sk-3f9c-very-secret"


def attempt(place: Path) -> str:
    """Look for the key wherever it could be."""
    from memlaw import cli

    came: list[str] = []

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            came.append(self.headers.get("Authorization", ""))
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            """Nothing."""

    class Redirects(Elsewhere):
        def do_GET(self) -> None:
            self.send_response(307)
            self.send_header("Location", f"{other}{self.path}")
            self.end_headers()

        do_POST = do_GET

    out = io.StringIO()
    environment = {"MEMLAW_ENDPOINT_KEY": KEY, "HF_TOKEN": KEY}
    with (
        serving(Elsewhere) as other,
        serving(Redirects) as url,
        mock.patch.dict(os.environ, environment),
        mock.patch.object(tempfile, "tempdir", str(place)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        cli.run(["audit", str(BOOK), "--endpoint", url, "--name", "m", "--retries=0"])
        for odd in (f"http://u:{KEY}@localhost:1", f"http://localhost:1/?key={KEY}", f"u:{KEY}@x"):
            require(cli.run(["audit", str(BOOK), "--endpoint", odd, "--name", "m"]) == 2, odd)
        with mock.patch("memlaw.measure.endpoint.audit_endpoint", side_effect=KeyError("odd")):
            cli.run(["audit", str(BOOK), "--endpoint", url, "--name", "m"])
    require(not came, "the key's bearer was sent to another server")
    require(KEY not in out.getvalue(), "the key was printed")
    written = [path for path in place.rglob("*") if path.is_file()]
    require(bool(written), "no report of a fault was written: nothing was tried")
    for path in written:
        require(KEY.encode() not in path.read_bytes(), f"the key is in {path.name}")
    return f"not in {len(written)} file(s), not printed, not sent on"
