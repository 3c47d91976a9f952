"""Memory that keeps up: what an update costs, a stream of generations, and updates that are killed.

    python benchmarks/update.py change --records 400 --changed 10
    python benchmarks/update.py stream --records 200 --generations 20 --adds 20 --edits 10 \
        --removals 10
    python benchmarks/update.py stream --records 200 --generations 100 --adds 0 --edits 10 \
        --removals 0
    python benchmarks/update.py kill --records 20 --kills 30
    python benchmarks/update.py shards --records 10000 --shards 100

`change` writes records, updates some of them (half replaced, half added), and writes the changed
ones anew. `stream` adds, replaces and removes in each generation. `kill` kills updates at random
moments; whatever is left must be the old generation or the new one. `shards` writes records spread
over adapters, as Ray tasks of one CPU. Records are made-up phone numbers. Each command prints a
line of JSON a step; --save adds them to results/update.jsonl, of `kill` and `shards` the last one.
`--specificity` trains with specificity; without it, harm elsewhere is not held. `--max-rank` lets
updates grow the adapter; without it they may to what `write` may. `stream --folder` and `shards
--folder` keep what they make, and go on from there when they are called again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from against_trl import ROOT, git_state, machine

import memlaw

RESULTS = ROOT / "results" / "update.jsonl"
Book = dict[str, str]


class Progress(memlaw.Observer):
    """Says on stderr how far it is."""

    def notice(self, text: str) -> None:
        """A line."""
        print(text, file=sys.stderr, flush=True)

    def epoch(self, stats: Any, n_records: int, max_epochs: int) -> None:
        """A line."""
        said = f"epoch {stats.epoch}: {stats.nll_nats:.3f} nats, {stats.n_under} under"
        print(f"{said}, {stats.wall_s:.1f} s", file=sys.stderr, flush=True)


class People:
    """Made-up people, each of them once, and numbers."""

    def __init__(self, seed: int) -> None:
        from faker import Faker

        self.faker, self.draw = Faker(), random.Random(seed)
        self.faker.seed_instance(seed)
        self.known: set[str] = set()

    def number(self) -> str:
        """Ten digits."""
        return "".join(self.draw.choices("0123456789", k=10))

    def more(self, n: int) -> Book:
        """n new people."""
        found: Book = {}
        while len(found) < n:
            name = f"{self.faker.first_name()} {self.faker.last_name()}:"
            if name not in self.known:
                self.known.add(name)
                found[name] = self.number()
        return found


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Of `write`."""
    found = {"specificity": args.specificity, "model": args.model, "max_epochs": args.max_epochs}
    return {**found, "max_damage": args.max_damage}


def told(what: str, result: Any, wall_s: float, out: Path) -> dict[str, Any]:
    """What a step was."""
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    return {
        "what": what,
        "certified": result.certified,
        "records": result.certificate.n_records,
        "rank": result.rank,
        "epochs": result.epochs,
        "damage_nats": result.damage.delta_nll_nats,
        "damage_high": result.damage.high,
        "training_s": run["timings"]["training_s"],
        "wall_s": wall_s,
    }


def change(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """An update, and the same records written anew."""
    people = People(args.seed)
    book = people.more(args.records)
    lines = []
    for name, data in (("write", book), ("update", None), ("anew", None)):
        if name == "update":
            edited = people.draw.sample(sorted(book), args.changed // 2)
            book = {**book, **{who: people.number() for who in edited}}
            book |= people.more(args.changed - len(edited))
        started = time.perf_counter()
        if name == "update":
            update = memlaw.update(
                folder / "write", list(book.items()), observer=Progress(), max_rank=args.max_rank
            )
            result, out = update.written, folder / "write"
            assert update.taken, "refused"
        else:
            out = folder / name
            pairs = list((data or book).items())
            result = memlaw.write(pairs, out, observer=Progress(), **settings(args))
        lines.append(told(name, result, time.perf_counter() - started, out))
    lines[1]["share_of_anew"] = lines[1]["wall_s"] / lines[2]["wall_s"]
    return lines


def stream(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Generation after generation; each removal is looked for again at the end.

    Those that `folder` has from an earlier call are drawn again, and not made again.
    """
    people, out = People(args.seed), folder / "out"
    book = people.more(args.records)
    run = out / "run.json"
    done = len(json.loads(run.read_text(encoding="utf-8"))["generations"]) if run.is_file() else 0
    if not done:
        started = time.perf_counter()
        result = memlaw.write(list(book.items()), out, observer=Progress(), **settings(args))
        yield told("write", result, time.perf_counter() - started, out)
    gone: Book = {}
    for generation in range(2, args.generations + 2):
        for who in people.draw.sample(sorted(book), args.removals):
            gone[who] = book.pop(who)
        for who in people.draw.sample(sorted(book), args.edits):
            book[who] = people.number()
        book |= people.more(args.adds)
        if generation <= done:
            continue
        started = time.perf_counter()
        update = memlaw.update(out, list(book.items()), observer=Progress(), max_rank=args.max_rank)
        line = told(f"generation {generation}", update.written, time.perf_counter() - started, out)
        line |= {"taken": update.taken, "forgotten": [one.to_json() for one in update.forgotten]}
        yield line
        if not update.taken:
            break
    audit = memlaw.audit(list(book.items()), adapter=out)
    end = {"what": "end", "decoded": audit.n_recalled, "records": len(book)}
    if gone:
        end["removed"] = len(gone)
        end["removed_decoded"] = memlaw.audit(list(gone.items()), adapter=out).n_recalled
    yield end


def _update(out: Path, pairs: list[tuple[str, str]], new: Path | None = None) -> None:
    memlaw.update(out, pairs, new=new)


def kill(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Updates of one folder, killed at random moments, and one that isn't."""
    people, out = People(args.seed), folder / "out"
    book = people.more(args.records)
    memlaw.write(list(book.items()), out, observer=Progress(), **settings(args))
    shutil.copytree(out, folder / "first")
    states = {1: list(book.items()), 2: list({**book, **people.more(1)}.items())}
    context = multiprocessing.get_context("spawn")
    started = time.perf_counter()
    undisturbed = context.Process(target=_update, args=(out, states[2], folder / "undisturbed"))
    undisturbed.start()  # a process of its own, as those that are killed: it has to start, too
    undisturbed.join()
    whole_s = time.perf_counter() - started
    wanted = (folder / "undisturbed" / "adapter_model.safetensors").read_bytes()
    lines: list[dict[str, Any]] = []
    for _ in range(args.kills):
        process = context.Process(target=_update, args=(out, states[2]))
        process.start()
        wait_s = people.draw.uniform(0, 1.2 * whole_s)
        process.join(wait_s)
        was_running = process.is_alive()
        if was_running and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        run = json.loads((out / "run.json").read_text(encoding="utf-8"))
        number = len(run["generations"])
        check = memlaw.check_certificate(out / "certificate.json", states[number])
        same = memlaw.diff(out, states[number]).nothing
        line = {"what": "kill", "after_s": wait_s, "killed": was_running, "generation": number}
        lines.append({**line, "whole": check.holds and same})
        print(json.dumps(lines[-1]), flush=True)
        if number == 2:
            shutil.rmtree(out)
            shutil.copytree(folder / "first", out)  # the next one is the second again
    memlaw.update(out, states[2])
    ends_alike = (out / "adapter_model.safetensors").read_bytes() == wanted
    whole = sum(line["whole"] for line in lines)
    return [{"what": "end", "kills": len(lines), "whole": whole, "ends_alike": ends_alike}]


def shards(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Records over adapters, as Ray tasks of one CPU each; a line as each ends."""
    import psutil

    from memlaw.shards.writing import ray_launcher

    book, ended = People(args.seed).more(args.records), threading.Event()
    started, peak_gib = time.perf_counter(), 0.0

    def watch() -> None:
        nonlocal peak_gib
        while not ended.wait(2):
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if "ray::" in process.name():
                        peak_gib = max(peak_gib, process.memory_info().rss / 2**30)

    def launch(jobs: Any, *given: Any) -> Iterator[str]:
        for done, name in enumerate(ray_launcher(cpus=1)(jobs, *given), 1):
            run = json.loads((folder / "out/shards" / name / "run.json").read_text("utf-8"))
            line = {"what": name, "done": done, "of": len(jobs), "epochs": run["epochs"]}
            line |= {"shard_s": run["timings"]["wall_s"], "peak_gib": peak_gib}
            print(json.dumps({**line, "wall_s": time.perf_counter() - started}), flush=True)
            yield name

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found = memlaw.write_shards(
            list(book.items()),
            folder / "out",
            shards=args.shards,
            launcher=launch,
            resume=True,
            **settings(args),
        )
    finally:
        ended.set()
        watcher.join()
    whole = found.certificate
    end = {"what": "end", "certified": whole.n_certified, "records": whole.n_records}
    return [{**end, "wall_s": found.wall_s, "peak_gib": peak_gib}]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    sizes = {
        "change": {"records": 400, "changed": 10},
        "stream": {"records": 200, "generations": 20, "adds": 20, "edits": 10, "removals": 10},
        "kill": {"records": 20, "kills": 30},
        "shards": {"records": 10_000, "shards": 100},
    }
    for name, options in sizes.items():
        command = commands.add_parser(name)
        for option, usual in options.items():
            command.add_argument(f"--{option}", type=int, default=usual)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--model", default="embedded")
        command.add_argument("--max-epochs", type=int, default=300)
        command.add_argument("--max-damage", type=float)
        command.add_argument("--specificity", action="store_true")
        command.add_argument("--max-rank", type=int, help="that updates may grow to")
        command.add_argument("--save", action="store_true")
        if name in ("stream", "shards"):
            command.add_argument("--folder", type=Path, help="keep it here, and go on from there")
    args = parser.parse_args()
    run = {"change": change, "stream": stream, "kill": kill, "shards": shards}[args.command]
    about = {
        "command": sys.argv[1:],
        "git": git_state(),
        "machine": machine(torch.get_num_threads()),
    }
    with tempfile.TemporaryDirectory() as scratch:
        for line in run(args, getattr(args, "folder", None) or Path(scratch)):
            print(json.dumps(line), flush=True)
            if args.save:
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**line, **about}) + "\n")


if __name__ == "__main__":
    main()
