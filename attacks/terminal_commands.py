r"""Commands to a terminal in records, ids, names of files and a server's errors.

`\x1b]52;…` fills the clipboard, `\x1b[2J` clears the screen, `\x9b` begins a command in eight
bits, U+202E turns the order of what follows; `[/]` is markup of the library that prints tables.
All that is printed goes through one console and one function, which write such characters out.
"""

import contextlib
import http.server
import io
import json
import re
from pathlib import Path

from common import MODEL, copied, require, serving

EVIL = "\x1b]52;c;aGk=\x07\x1b[2J\x9b31m\u202e[/][bold]x"
_COMMANDS = re.compile("[\x1b\x07\x9b\u202e]")


class _Rude(http.server.BaseHTTPRequestHandler):
    def _answer(self) -> None:
        body = json.dumps({"error": {"message": EVIL}}, ensure_ascii=False).encode()
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = _answer

    def log_message(self, *args: object) -> None:
        """Nothing."""


def _printed(*args: str) -> str:
    from memlaw import cli

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        cli.run(list(args))
    return out.getvalue()


def attempt(place: Path) -> str:
    """Print it in each way."""
    data = place / f"book{EVIL.replace('/', '')}.jsonl"
    row = {"prompt": f"Q{EVIL}", "completion": f"A{EVIL}", "id": EVIL}
    data.write_text(json.dumps(row) + "\n", encoding="utf-8")
    folder = str(copied(place))
    with serving(_Rude) as url:
        found = {
            "records": _printed("audit", str(data), "--adapter", folder, "--model", str(MODEL)),
            "records as JSON": _printed(
                "audit", str(data), "--adapter", folder, "--model", str(MODEL), "--json"
            ),
            "a server": _printed("audit", str(data), "--endpoint", url, "--name", f"m{EVIL}"),
            "a file's name": _printed("audit", f"{data}x", "--adapter", folder),
            "a difference": _printed("diff", folder, str(data), "--model", str(MODEL)),
        }
    for what, text in found.items():
        require(not _COMMANDS.search(text), f"{what}: a command came through")
        require(len(text) > 0 and "Traceback" not in text, f"{what}: nothing was printed")
    require("bold" in found["records"], "the record isn't shown at all: nothing was tried")
    return " ".join(found["a file's name"].split())[:150]
