"""memlaw against TRL's SFTTrainer with PEFT, and against its own plain engine, side by side.

    make bench                                                # everything; hours on two cores
    python benchmarks/against_trl.py run --parts step         # seconds an optimiser step
    python benchmarks/against_trl.py run --parts recall       # seconds until all is recited
    python benchmarks/against_trl.py run --parts recall --lrs 3e-3 --seeds '' --plain-seeds ''
    python benchmarks/against_trl.py table                    # the results as Markdown

Every contender gets the same base model (the embedded one, bfloat16), the same 100 PhoneBook
records as the same tokens, the same batches of 10, the same threads, and a process of its own.
The processes run in turn, never two at once. TRL trains a PEFT LoRA on the module that memlaw
adapts too, without gradient checkpointing, logging and saving.

`step`: rank 8, rounds in which every contender has its turn: SFTTrainer with bfloat16 weights,
and with autocast over them; the same with Transformers' own loss in place of TRL's, which on a
CPU is the slower one; memlaw with its defaults; memlaw's plain engine with the paper's placement.
`recall`: the TRL that was fastest in `step`. Its clock runs while it trains: not while it loads,
sets up or is audited. memlaw's runs through the whole `memlaw.write`, statistics, audits and
certificate included, but for loading the model. TRL is only asked to recite; memlaw certifies.

Results go to `results/against_trl.json` after every process: a later run of `recall` adds to what
is there, and replaces what it measures again; a run of `step` starts afresh.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data" / "phonebook_1000.jsonl"
RESULTS = ROOT / "results" / "against_trl.json"
STEP_RANK = 8
NAMES = {
    "trl": "TRL SFTTrainer",
    "trl_autocast": "TRL SFTTrainer, autocast",
    "trl_logits": "TRL SFTTrainer, Transformers' loss",
    "trl_logits_autocast": "TRL SFTTrainer, Transformers' loss, autocast",
    "memlaw_cached": "memlaw",
    "memlaw_plain": "memlaw, plain engine, the paper's placement and rate",
}
TRL = [name for name in NAMES if name.startswith("trl")]
KEY = (
    "contender",
    "learning_rate",
    "schedule",
    "seed",
)  # what tells measurements of `recall` apart

Measurement = dict[str, Any]


def main() -> int:
    """Run what the command line asks for; returns the exit status."""
    arguments = _parser().parse_args()
    if arguments.command == "worker":
        from contenders import measure

        print(json.dumps(measure(json.loads(arguments.spec))))
        return 0
    if arguments.command == "table":
        print(table(_read(arguments.results)))
        return 0
    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="measure, and add to the results")
    add = command.add_argument
    add("--data", type=Path, default=DATA, help="JSONL with the fields query and target")
    add("--results", type=Path, default=RESULTS, help="file to write")
    add("--parts", type=_words, default=["step", "recall"], help="step, recall, or step,recall")
    add("--threads", type=int, help="cores to use, from the first (default: all)")
    add("--records", type=int, help="only the first so many (default: all)")
    add("--rounds", type=int, default=5, help="step: how often each contender has its turn")
    add("--warm-up", type=int, default=3, help="step: steps before the clock starts")
    add("--steps", type=int, default=20, help="step: steps timed in a process")
    add("--lrs", type=_numbers, default="1e-3,3e-3,1e-2,3e-2", help="recall: TRL's learning rates")
    add("--trl-schedule", default="linear", help="recall: TRL's learning-rate schedule")
    add("--rank", type=int, default=64, help="recall: TRL's rank (what memlaw takes for 100)")
    add(
        "--trl",
        choices=["auto", *TRL],
        default="auto",
        help="recall: which (auto: fastest in step)",
    )
    add("--audit-every", type=int, default=2, help="recall: epochs between two audits of TRL")
    add("--cap-seconds", type=float, default=900, help="recall: TRL trains no longer than this")
    add("--max-epochs", type=int, default=100, help="recall: TRL trains no longer than this")
    add("--seeds", type=_numbers, default="0,1,2,3,4", help="recall: seeds of memlaw.write")
    add("--write-epochs", type=int, default=1000, help="recall: memlaw.write gives up after these")
    add("--plain-seeds", type=_numbers, default="0", help="recall: seeds of the plain engine")
    add("--plain-epochs", type=int, default=300, help="recall: the plain engine gives up after")
    add("--plain-lr", type=float, default=1e-2, help="recall: the plain engine's learning rate")
    command = commands.add_parser("table", help="print the results as Markdown")
    command.add_argument("--results", type=Path, default=RESULTS)
    commands.add_parser("worker").add_argument("spec", help="JSON; used by run")
    return parser


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in _words(text)]


# ---------------------------------------------------------------- running


def run(arguments: argparse.Namespace) -> int:
    """Measure the parts asked for; 0 if every process gave a measurement."""
    if unknown := sorted(set(arguments.parts) - {"step", "recall"}):
        return _refuse(f"there is no part {', '.join(unknown)}: give step, recall, or step,recall.")
    if not arguments.data.is_file():
        return _refuse(f"{arguments.data} does not exist. Name the PhoneBook file with --data.")
    if arguments.records and arguments.results == RESULTS:
        return _refuse("with --records, name another file for the results with --results.")
    try:
        versions = {n: version(n) for n in ("memlaw", "torch", "transformers", "peft", "trl")}
    except PackageNotFoundError as error:
        return _refuse(f"{error.name} is not installed. Run make bench.")
    threads = _pin(arguments.threads)
    context = {
        "machine": machine(threads),
        "versions": versions,
        "git": git_state(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
    }
    context["settings"] |= {"data": arguments.data.name, "results": arguments.results.name}
    shared = {
        "data": str(arguments.data.resolve()),
        "threads": threads,
        "records": arguments.records,
    }
    n_failed = 0
    for part in arguments.parts:
        results = _read(arguments.results)
        specs = step_specs(arguments) if part == "step" else recall_specs(arguments, results)
        kept = results.get(part, {}) if part == "recall" else {}
        kept = {"runs": kept.get("runs", {}), "measurements": kept.get("measurements", [])}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        for number, spec in enumerate(specs, 1):
            print(f"{part} {number}/{len(specs)}: {_title(spec)}", file=sys.stderr, flush=True)
            measurement = start_worker(shared | spec | {"part": part}, threads)
            n_failed += "error" in measurement
            add_measurement(kept, {**spec, **measurement, "run": date}, {date: context})
            results[part] = kept | {"summary": SUMMARIES[part](kept["measurements"])}
            _write(arguments.results, results)
    print(table(_read(arguments.results)))
    return 1 if n_failed else 0


def _refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


def _pin(threads: int | None) -> int:
    """Keep this process, and so all that it starts, to the first cores; returns how many."""
    if not hasattr(os, "sched_setaffinity"):
        return threads or os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, cores)
    return len(cores)


def step_specs(arguments: argparse.Namespace) -> list[Measurement]:
    """Rounds; each begins with another contender."""
    shared = {"rank": STEP_RANK, "learning_rate": 1e-3, "schedule": "constant", "seed": 0}
    shared |= {"warm_up": arguments.warm_up, "steps": arguments.steps}
    names = [*NAMES, *NAMES]
    return [
        {"contender": contender, "round": number} | shared
        for number in range(arguments.rounds)
        for contender in names[number % len(NAMES) :][: len(NAMES)]
    ]


def recall_specs(arguments: argparse.Namespace, results: dict[str, Any]) -> list[Measurement]:
    """The contenders by turns, until each has had all its learning rates or seeds."""
    contender = _fastest_trl(results) if arguments.trl == "auto" else arguments.trl
    trl = [
        {
            "contender": contender,
            "learning_rate": learning_rate,
            "schedule": arguments.trl_schedule,
            "seed": 0,
            "rank": arguments.rank,
            "audit_every": arguments.audit_every,
            "cap_seconds": arguments.cap_seconds,
            "max_epochs": arguments.max_epochs,
        }
        for learning_rate in arguments.lrs
    ]
    cached = [
        {"contender": "memlaw_cached", "seed": int(s), "max_epochs": arguments.write_epochs}
        for s in arguments.seeds
    ]
    plain = [
        {
            "contender": "memlaw_plain",
            "learning_rate": arguments.plain_lr,
            "seed": int(seed),
            "max_epochs": arguments.plain_epochs,
        }
        for seed in arguments.plain_seeds
    ]
    return [spec for spec in chain(*zip_longest(cached, trl, plain)) if spec]


def _fastest_trl(results: dict[str, Any]) -> str:
    """By its median step; where none was measured, TRL as it comes."""
    found = results.get("step", {}).get("summary", {}).get("contenders", {})
    return min(
        (c for c in TRL if c in found), key=lambda c: found[c]["step_s"]["median"], default="trl"
    )


def start_worker(spec: Measurement, threads: int) -> Measurement:
    """Run one contender in a process of its own; what it measured, or its error."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(Path(__file__).resolve()), "worker", json.dumps(spec)]
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    process = {"process_s": time.perf_counter() - started}
    try:
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1]) | process
    except (ValueError, IndexError):
        pass
    print(done.stderr[-3000:], file=sys.stderr)
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    return {"error": f"exit status {done.returncode}: {last}"} | process


def add_measurement(
    part: dict[str, Any], measurement: Measurement, context: dict[str, Any]
) -> None:
    """Add to a part; in `recall` instead of what was measured with the same settings before."""
    if "round" not in measurement:
        key = [measurement.get(name) for name in KEY]
        others = [m for m in part["measurements"] if [m.get(name) for name in KEY] != key]
        part["measurements"] = others
    part["measurements"].append(measurement)
    used = {m["run"] for m in part["measurements"]}
    part["runs"] = {d: c for d, c in (part["runs"] | context).items() if d in used}


def _title(spec: Measurement) -> str:
    parts = ("round", "learning_rate", "seed")
    return ", ".join([NAMES[spec["contender"]], *(f"{k} {spec[k]:g}" for k in parts if k in spec)])


# ---------------------------------------------------------------- where and when


def machine(threads: int) -> dict[str, Any]:
    """What it was measured on."""
    cpu = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu,
        "n_cores": os.cpu_count(),
        "n_threads": threads,
    }


def git_state() -> dict[str, Any]:
    """The commit, and whether anything but the results differs from it."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--", ".", ":!results")
    return {"commit": commit, "is_dirty": None if commit is None else bool(changes)}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(path.name + ".part")
    work.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(work, path)


# ---------------------------------------------------------------- summaries


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _by_contender(measurements: list[Measurement]) -> Iterator[tuple[str, list[Measurement]]]:
    for contender in NAMES:
        found = [m for m in measurements if m["contender"] == contender and "error" not in m]
        if found:
            yield contender, found


def summarize_step(measurements: list[Measurement]) -> dict[str, Any]:
    """Medians over rounds, and how many of memlaw's steps of the same round one step takes."""
    contenders: dict[str, Any] = {}
    rounds = {(m["contender"], m["round"]): m["median_s"] for m in measurements if "error" not in m}
    for contender, found in _by_contender(measurements):
        ratios = [
            m["median_s"] / rounds["memlaw_cached", m["round"]]
            for m in found
            if ("memlaw_cached", m["round"]) in rounds
        ]
        contenders[contender] = {
            "n_rounds": len(found),
            "step_s": _spread([m["median_s"] for m in found]),
            "times_memlaw": _spread(ratios) if ratios else None,
            "peak_mb": _spread([m["peak_mb"] for m in found]),
        }
    return {"contenders": contenders}


def summarize_recall(measurements: list[Measurement]) -> dict[str, Any]:
    """TRL's best learning rate against memlaw's median seed."""
    found = dict(_by_contender(measurements))
    best = _best([m for contender in TRL for m in found.get(contender, [])])
    times = [m["seconds"] if m["is_reached"] else math.inf for m in found.get("memlaw_cached", [])]
    median = statistics.median(times) if times else math.inf
    summary: dict[str, Any] = {"trl_best": None, "memlaw_median_s": None, "ratio": None}
    if best:
        summary["trl_best"] = {k: best[k] for k in (*KEY, "seconds", "is_reached", "n_recalled")}
    if median < math.inf:
        summary["memlaw_median_s"] = median
    if best and median < math.inf:
        # Where TRL was stopped before it got there, it takes at least so many times as long.
        summary["ratio"] = {
            "value": best["seconds"] / median,
            "is_lower_bound": not best["is_reached"],
        }
    return summary


def _best(trl: list[Measurement]) -> Measurement | None:
    """The first to recite everything; if none does, the one that recites most."""
    trl = [m for m in trl if m["stopped_because"] != "diverged"]
    if reached := [m for m in trl if m["is_reached"]]:
        return min(reached, key=lambda m: m["seconds"])
    return max(trl, key=lambda m: (m["n_recalled"], m["seconds"]), default=None)


SUMMARIES = {"step": summarize_step, "recall": summarize_recall}


# ---------------------------------------------------------------- the table


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    parts = []
    if "step" in results:
        parts += [_step_table(results["step"]), _where(results["step"])]
    if "recall" in results:
        parts += [_recall_table(results["recall"]), _ratio(results["recall"]["summary"])]
        parts += [_where(results["recall"])]
    return "\n\n".join(parts) or "There are no results yet."


def _step_table(part: dict[str, Any]) -> str:
    lines = [
        "| | seconds a step | times memlaw's | peak memory, MB |",
        "|---|---|---|---|",
    ]
    for contender, found in part["summary"]["contenders"].items():
        ratio = _span(found["times_memlaw"], ".2f") if found["times_memlaw"] else "–"
        lines.append(
            f"| {NAMES[contender]} | {_span(found['step_s'], '.3f')} | {ratio} "
            f"| {found['peak_mb']['median']:,.0f} |"
        )
    return "\n".join(lines)


def _recall_table(part: dict[str, Any]) -> str:
    lines = [
        "| | recited | seconds | of it training | epochs | rank | ΔNLL | peak memory, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for contender, found in _by_contender(part["measurements"]):
        for m in sorted(found, key=lambda m: (m.get("learning_rate", 0), m["seed"])):
            is_trl = contender in TRL
            label = f"seed {m['seed']}"
            if is_trl:
                label = f"learning rate {m['learning_rate']:g}, {m['schedule']}"
            damage = "–" if m["delta_nll_nats"] is None else f"{m['delta_nll_nats']:+.3f}"
            lines.append(
                f"| {NAMES[contender]}, {label} | {m['n_recalled']} of {m['n_records']} "
                f"| {'' if m['is_reached'] else 'stopped at '}{m['seconds']:,.0f} "
                f"| {m.get('training_s', m['seconds']):,.0f} "
                f"| {m['epochs']} | {m['rank']} | {damage} | {m['peak_mb']:,.0f} |"
            )
    return "\n".join(lines)


def _ratio(summary: dict[str, Any]) -> str:
    if not summary["ratio"]:
        return "TRL and memlaw are not both measured yet, or memlaw's median seed did not certify."
    best, ratio = summary["trl_best"], summary["ratio"]
    bound = "≥ " if ratio["is_lower_bound"] else ""
    return (
        f"TRL's best learning rate ({best['learning_rate']:g}) takes {bound}{ratio['value']:.1f} "
        f"times as long as memlaw's median ({summary['memlaw_median_s']:,.0f} s)."
    )


def _span(spread: dict[str, float], style: str) -> str:
    return f"{spread['median']:{style}} ({spread['min']:{style}} to {spread['max']:{style}})"


def _where(part: dict[str, Any]) -> str:
    found = []
    for date, run in part["runs"].items():
        where, git = run["machine"], run["git"]
        versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
        commit = (git["commit"] or "unknown")[:12] + (" with changes" if git["is_dirty"] else "")
        found.append(
            f"{date[:10]}: {where['cpu']}, {where['n_threads']} of {where['n_cores']} cores; "
            f"{versions}; commit {commit}."
        )
    return "\n".join(dict.fromkeys(found))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted. What was measured is kept.", file=sys.stderr)
        sys.exit(130)
