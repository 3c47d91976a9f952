"""What the attempts share: copies of small folders that were written before, and their model."""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).resolve().parent.parent / "tests" / "recorded"
MODEL, BOOK = RECORDED / "model", RECORDED / "data" / "book.jsonl"


class Broken(Exception):
    """An attempt that came through."""


def copied(place: Path, name: str = "finished") -> Path:
    """A folder of a run in `place`: `finished` is certified, `unfinished` isn't."""
    return Path(shutil.copytree(RECORDED / "folders" / name, place / name))


def edited(path: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def checked(folder: Path, model: Path = MODEL) -> Any:
    """The certificate of a folder, measured again."""
    import memlaw

    return memlaw.check_certificate(folder / "certificate.json", BOOK, model=str(model))


@contextlib.contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on this machine, as long as the block runs."""
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def require(holds: bool, what: str) -> None:
    """Raise Broken, saying what came through, unless it holds."""
    if not holds:
        raise Broken(what)


def refused(call: Callable[[], Any]) -> str:
    """How memlaw refuses a call; Broken if it doesn't."""
    from memlaw.core.errors import MemlawError

    try:
        call()
    except MemlawError as error:
        return str(error)
    raise Broken("not refused")
