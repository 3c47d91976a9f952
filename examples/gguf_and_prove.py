"""Export an adapter to a GGUF file, and prove what it recites: read back, and by llama.cpp.

    python examples/gguf_and_prove.py OUT RECORDS DEST [TYPE]

OUT is a folder that `memlaw write` made, DEST a folder to create, TYPE of the merged weights: f16
(default), bf16, f32 or q8_0. The export is read back and audited; then llama.cpp's own server, of
the extra `llama`, is asked for each record over HTTP. Exit status 0 when both recite all.
"""

import subprocess
import sys
from pathlib import Path

folder, records, dest = sys.argv[1:4]
kind = sys.argv[4] if len(sys.argv) > 4 else "f16"
memlaw = [sys.executable, "-c", "from memlaw.cli import main; main()"]
export = ["export", folder, records, "--to", "gguf", "--gguf-type", kind, "-o", dest]
subprocess.run([*memlaw, *export], check=True)

try:
    import xllamacpp
except ImportError:
    sys.exit("llama.cpp's server isn't here: pip install '.[llama]'. The export was audited above.")
params = xllamacpp.CommonParams()
params.model.path = str(Path(dest, "model.gguf").resolve())
params.n_ctx, params.n_parallel = 2048, 1
params.cpuparams.n_threads = 1
params.port = 0  # any that is free
params.use_jinja = True  # the chat template that the file holds
params.warmup = False
server = xllamacpp.Server(params)
url = f"{server.listening_address}/v1"
ask = ["audit", records, "--endpoint", url, "--name", params.model.path, "--concurrency", "1"]
proof = ["--certificate", str(Path(folder) / "certificate.json")]
sys.exit(subprocess.run([*memlaw, *ask, *proof]).returncode)
