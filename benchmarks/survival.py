"""The survival tables of docs/survival.md: forty phone numbers, written plainly and robustly.

    python benchmarks/survival.py FOLDER    # minutes on an idle core, half an hour on a busy one

FOLDER is made, and holds the data and both adapters. The tables go to standard output, and the
forms that fail in the plain one are what a robust adapter is for.
"""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

from memlaw.data.tasks import phone_book

ROBUST_TO = "merged-bf16,merged-fp16,gguf-q8_0"

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
data = folder / "data.jsonl"
rows = ({"prompt": r.prompt, "completion": r.completion} for r in islice(phone_book(0), 40))
data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
memlaw = [sys.executable, "-c", "from memlaw.cli import main; main()"]
for name, given in (("plain", []), ("robust", ["--robust-to", ROBUST_TO])):
    how = ["--no-specificity", "--max-epochs", "300", *given]
    out = str(folder / name)
    subprocess.run([*memlaw, "write", str(data), "-o", out, *how], check=True)
    table = [*memlaw, "audit", str(data), "--adapter", out, "--survival"]
    subprocess.run(table, check=False)  # its status says whether all forms recite
