"""The survival tables of docs/survival.md: phone numbers, written plainly and robustly.

    python benchmarks/survival.py run FOLDER [RECORDS]   # 40 records: half an hour of a slow core
    python benchmarks/survival.py table                  # the results as Markdown

FOLDER is made, and holds the data and both adapters. With the extra `quant` the forms with a
quantised base model are tried, too. `run` writes `results/survival.json`; stopped, the same command
goes on behind what is finished in FOLDER.
"""

import datetime
import importlib.metadata
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from memlaw.data.tasks import phone_book

RESULTS = Path(__file__).resolve().parents[1] / "results" / "survival.json"
ROBUST_TO = "merged-bf16,merged-fp16,gguf-q8_0"
WAYS: dict[str, list[str]] = {"plain": [], "robust": ["--robust-to", ROBUST_TO]}
VERSIONS = ("memlaw", "torch", "transformers", "peft")


def run(folder: Path, n_records: int) -> None:
    """Write and audit both adapters."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data.jsonl"
    rows = ({"prompt": r.prompt, "completion": r.completion} for r in phone_book(0))
    data.write_text("".join(json.dumps(row) + "\n" for row in islice(rows, n_records)))
    ways = {}
    for name, given in WAYS.items():
        out, found = folder / name, folder / f"{name}.json"
        if not found.exists():
            if not (out / "run.json").exists():
                how = ["--no-specificity", "--max-epochs", "300", *given]
                _memlaw("write", str(data), "-o", str(out), *how)
            told = _memlaw("audit", str(data), "--adapter", str(out), "--survival", "--json")
            found.write_text(told)
        ways[name] = _of_run(out) | json.loads(found.read_text())
    content = {
        "n_records": n_records,
        "robust_to": ROBUST_TO,
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "ways": ways,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def _memlaw(*args: str) -> str:
    """What a command prints; 1 is the status of a table in which some form fails."""
    command = [sys.executable, "-c", "from memlaw.cli import main; main()", *args]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        sys.exit(f"memlaw {args[0]} ended with status {done.returncode}")
    return done.stdout


def _of_run(out: Path) -> dict[str, Any]:
    told = json.loads((out / "run.json").read_text())
    damage = told["results"]["damage"]["delta_nll_nats"]
    return {"epochs": told["epochs"], "rank": told["adapter"]["rank"], "delta_nll_nats": damage}


def table() -> None:
    """A row a form: certified, recited, lowest p, for each adapter."""
    content = json.loads(RESULTS.read_text())
    ways = content["ways"]
    cells = " | ".join(f"{name}: certified | recited | lowest p" for name in ways)
    print(f"| form | {cells} |\n{'|---' * (1 + 3 * len(ways))}|")
    for rows in zip(*(way["rows"] for way in ways.values()), strict=True):
        print(f"| `{rows[0]['name']}` | {' | '.join(_cells(row) for row in rows)} |")
    told = [
        f"*{name}*: {way['epochs']} epochs, rank {way['rank']}, ΔNLL {way['delta_nll_nats']:+.3f}"
        for name, way in ways.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    print(f"\n{'; '.join(told)}. *robust* is written with `--robust-to {content['robust_to']}`.")
    print(f"{content['n_records']} records, one seed, {content['date']}; {versions}.")


def _cells(row: dict[str, Any]) -> str:
    if not row["tried"]:
        return "not tried | | "
    return f"{row['n_certified']} | {row['n_recited']} | {row['lowest_p']:.3f}"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", folder]:
            run(Path(folder), 40)
        case ["run", folder, n_records]:
            run(Path(folder), int(n_records))
        case ["table"]:
            table()
        case _:
            sys.exit(__doc__)
