"""memlaw against TRL and the paper's recipe on one GPU, unattended, in less than ten minutes.

    python benchmarks/gpu.py run [--model MODEL] [--records 100] [--seeds 0,1,2] [--limit 540]
    python benchmarks/gpu.py table

Each contender is a process of its own, a few of them side by side on the GPU; their seconds tell
how long that took, not how fast each is alone (`--at-once 1` for that). One that takes longer than
its time, or longer than there is left, is stopped, and its row says so. All adapters are then
measured as in benchmarks/specificity.py. Results go to results/gpu.json after each process.

The contenders: memlaw with its defaults; memlaw with `specificity` off; TRL's SFTTrainer with a
PEFT LoRA on the module that memlaw adapts then, and on all linear modules; memlaw's plain engine
with the paper's placement, constant rate and no more. On a CPU the same takes hours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from against_trl import DATA, ROOT, machine

RESULTS = ROOT / "results" / "gpu.json"
RATES = {"trl_one": 1e-2, "trl_all": 1e-3, "paper": 1e-2}
NAMES = {
    "held": "memlaw",
    "free": "memlaw, specificity off",
    "trl_one": "TRL, one module",
    "trl_all": "TRL, all linear modules",
    "paper": "the paper's recipe",
}
Row = dict[str, Any]


def main() -> int:
    """Run what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("run", help="measure everything").add_argument
    add("--data", type=Path, default=DATA, help="JSONL with the fields query and target")
    add("--model", default="embedded", help="a model folder, or the embedded model")
    add("--records", type=int, default=100, help="only the first so many")
    add("--seeds", default="0,1,2", help="of memlaw with its defaults; the others get the first")
    add("--only", default=",".join(NAMES), help=f"contenders, of {','.join(NAMES)}")
    add("--limit", type=float, default=540, help="seconds for everything")
    add("--each", type=float, default=400, help="seconds for a process")
    add("--at-once", type=int, default=4, help="processes side by side")
    add("--rank", type=int, default=64, help="TRL's rank")
    add("--max-epochs", type=int, help="nobody trains longer than this")
    add("--results", type=Path, default=RESULTS, help="file to write")
    command = commands.add_parser("job", help="one contender; what run starts")
    command.add_argument("spec")
    command = commands.add_parser("table", help="print the results as Markdown")
    command.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.command == "job":
        print(json.dumps(job(json.loads(arguments.spec))))
        return 0
    if arguments.command == "table":
        print(table(json.loads(arguments.results.read_text(encoding="utf-8"))["rows"]))
        return 0
    return run(arguments)


# ---------------------------------------------------------------- all of them


def run(arguments: argparse.Namespace) -> int:
    """Measure the contenders; 0 if every process gave a measurement."""
    ends = time.monotonic() + arguments.limit
    shared = {
        "data": str(arguments.data.resolve()),
        "records": arguments.records,
        "model": arguments.model,
        "rank": arguments.rank,
        "max_epochs": arguments.max_epochs,
        "cap_seconds": 0.75 * arguments.each,  # of TRL's training
    }
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    specs = [
        shared | {"way": way, "seed": seed}
        for way in arguments.only.split(",")
        for seed in (seeds if way == "held" else seeds[:1])
    ]
    rows: list[Row] = []
    with ThreadPoolExecutor(arguments.at_once) as pool:
        started = [pool.submit(_process, spec, arguments.each, ends) for spec in specs]
        for spec, process in zip(specs, started, strict=True):
            rows.append(spec | process.result())
            content = {"device": _device(), "machine": machine(arguments.at_once), "rows": rows}
            arguments.results.parent.mkdir(parents=True, exist_ok=True)
            arguments.results.write_text(json.dumps(content, indent=1), encoding="utf-8")
    print(table(rows))
    return 1 if any("error" in row for row in rows) else 0


def _process(spec: Row, each: float, ends: float) -> Row:
    """One contender in a process of its own; what it measured, or why not."""
    room = min(each, ends - time.monotonic())
    if room <= 0:
        return {"error": "no time left"}
    environment = {"OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "job", json.dumps(spec)]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=environment | os.environ, capture_output=True, text=True, timeout=room
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {room:.0f} s"}
    process_s = time.perf_counter() - started
    print(f"{spec['way']} {spec['seed']}: {process_s:.0f} s", file=sys.stderr, flush=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1]) | {"process_s": process_s}
    print(done.stderr[-5000:], file=sys.stderr, flush=True)
    return {"error": (done.stderr.strip() or "no message").splitlines()[-1]}


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


# ---------------------------------------------------------------- one of them


def job(spec: Row) -> Row:
    """Train what `spec` says, and measure it."""
    import specificity

    data, n, model = spec["data"], spec["records"], spec["model"]
    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch.object(specificity, "RESULTS", Path(name) / "results"),
    ):
        out = Path(name) / "out"
        way = spec["way"]
        found = _train_trl(spec, out) if way.startswith("trl") else _write(spec, out)
        specificity.run_folder(way, out, data, n, model)
        (file,) = specificity.RESULTS.glob("*.json")
        measured = json.loads(file.read_text(encoding="utf-8"))
    return found | {key: measured[key] for key in ("certified", "harms")}


def _write(spec: Row, out: Path) -> Row:
    import specificity
    from contenders import PAPER_RECIPE

    import memlaw

    settings: Row = {"seed": spec["seed"], "model": spec["model"]}
    if spec["max_epochs"]:
        settings["max_epochs"] = spec["max_epochs"]
    if spec["way"] != "held":
        settings["specificity"] = False
    if spec["way"] == "paper":
        settings |= PAPER_RECIPE | {"engine": "plain", "learning_rate": RATES["paper"]}
    records = specificity.records_of(spec["data"], spec["records"])
    started = time.perf_counter()
    with specificity.near_file(specificity.groups_of(records)) as near:
        if spec["way"] == "held":
            settings["near"] = near  # training avoids them
        result = memlaw.write(records, out, observer=specificity.Progress(), **settings)
    return {
        "wall_s": time.perf_counter() - started,
        "training_s": json.loads((out / "run.json").read_text())["timings"]["training_s"],
        "epochs": result.epochs,
        "numbers": result.n_parameters,
        "stopped_because": result.stopped_because,
    }


def _train_trl(spec: Row, out: Path) -> Row:
    import contenders

    from memlaw.model.base import load_model
    from memlaw.model.sites import resolve_sites

    one = [s.module for s in resolve_sites(load_model(spec["model"]).model, "down_proj", "auto")]
    found = contenders._trl_recall(
        spec
        | {
            "contender": "trl",
            "learning_rate": RATES[spec["way"]],
            "schedule": "linear",
            "audit_every": 2,
            "max_epochs": spec["max_epochs"] or 100,
            "modules": one if spec["way"] == "trl_one" else "all-linear",
            "save": str(out),
        }
    )
    kept = ("epochs", "stopped_because", "n_recalled")
    return {key: found[key] for key in kept} | {
        "wall_s": found["seconds"] + found["setup_s"] + found["audit_s"],
        "training_s": found["seconds"],
    }


# ---------------------------------------------------------------- the table


def table(rows: list[Row]) -> str:
    """The results as Markdown."""
    lines = [
        "| way | seed | certified | epochs | s | of it training | everyday unchanged | "
        "all unchanged, of the floor | leaks | made up | worst ΔNLL |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {NAMES[row['way']]} | {row['seed']} "
        if "error" in row:
            lines.append(f"{head}| {row['error']} |" + " |" * 8)
            continue
        harms = row["harms"]
        at, near = harms["elsewhere"], [harms["recombined"], harms["foreign"]]
        n = sum(group["n"] for group in near)
        worst = max(harms[name]["delta_nll_nats"] for name in ("damage", "prose", "chats"))
        cells = [
            f"{row['certified']} of {row['records']}",
            str(row["epochs"]),
            f"{row['wall_s']:.0f}",
            f"{row['training_s']:.0f}",
            f"{at['everyday_unchanged'] / at['n_everyday']:.0%}",
            f"{at['unchanged'] / at['floor']:.0%}",
            f"{sum(group['leaks'] for group in near)} of {n}",
            f"{sum(group['made_up'] for group in near) / n:.1%}",
            f"{worst:+.4f}",
        ]
        lines.append(f"{head}| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
