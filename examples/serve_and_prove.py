"""Merge an adapter, serve it with `transformers serve`, and prove over HTTP what it recites.

    python examples/serve_and_prove.py OUT RECORDS DEST

OUT is a folder that `memlaw write` made, DEST a folder to create. Needs the extra `serve`. Exit
status 0 when the server recites every record; any other OpenAI-style server can be asked likewise.
"""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

folder, records, merged = sys.argv[1:4]
memlaw = [sys.executable, "-c", "from memlaw.cli import main; main()"]
subprocess.run([*memlaw, "export", folder, records, "--to", "merged", "-o", merged], check=True)

name = str(Path(merged).resolve())
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
serve = [str(Path(sys.executable).with_name("transformers")), "serve", name]
server = subprocess.Popen([*serve, "--host", "127.0.0.1", "--port", str(port)])
try:
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            break
        except (urllib.error.URLError, ConnectionError):
            if server.poll() is not None:
                sys.exit("transformers serve ended by itself")
            time.sleep(0.5)
    ask = ["audit", records, "--endpoint", f"http://127.0.0.1:{port}/v1", "--name", name]
    proof = ["--certificate", str(Path(folder) / "certificate.json")]
    sys.exit(subprocess.run([*memlaw, *ask, *proof]).returncode)
finally:
    server.terminate()
    server.wait(30)
