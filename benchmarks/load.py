"""How time and memory grow as the work grows tenfold and a hundredfold.

    python benchmarks/load.py [--only audit ...] [--sizes 1 10 100] [--save FILE]

Each command is a process of its own, `write` without specificity: its wall seconds, and the most
memory it had at once, start included. `grew` is the exponent of the growth from the size before: 1
is linear, and less where the start still counts. A tiny random model stands in where the model
isn't what is asked about.

audit     short records: 1,000 at size 1
write     the same, written for one epoch: 100
report    tokens in the page of a folder: 1,000
long      tokens of one record, written for three epochs with the embedded model: 50
rank      the rank of an adapter, three epochs with the embedded model: 5
cells     cells of a probe's store that `fit` reads: 200
line      megabytes of the one record of a file, which no context holds; refused by `write`: 10
columns   fields of a row without a prompt, likewise refused: 10,000
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "faults"), str(Path(__file__).parent)]

EPOCHS = "--no-specificity --retention=0 --max-epochs"


@dataclass(frozen=True, kw_only=True)
class Load:
    """A command at a size.

    Attributes:
        unit: how much of it size 1 is.
        line: makes what is needed in a folder, and returns the command's words, and others that
            come before it and aren't measured.
        ends: the status that the command may end with.
    """

    unit: int
    line: Callable[[Path, int], list[str]]
    ends: tuple[int, ...] = (0, 1)  # 1: not certified


def book(path: Path, n: int, *, digits: int = 4) -> Path:
    """A file of n short records."""
    draw = random.Random(n)
    with path.open("w", encoding="utf-8") as file:
        for i in range(n):
            number = "".join(draw.choice("0123456789") for _ in range(digits))
            file.write(json.dumps({"prompt": f"Name {i}:", "completion": number}) + "\n")
    return path


def tiny(folder: Path) -> str:
    """The tiny model's option; its texts lie beside it."""
    from injecting import make_data, make_model

    make_model(folder / "model")
    make_data(folder)
    return f"--model={folder}/model"


def audit(folder: Path, n: int) -> list[str]:
    """Short records."""
    model = tiny(folder)
    data = book(folder / "data.jsonl", n)
    return [f"audit {data} {model} --tokens {folder}/tokens.parquet"]


def write(folder: Path, n: int) -> list[str]:
    """The same, written for an epoch."""
    options = f"{tiny(folder)} --damage-text={folder}/damage.txt"
    data = book(folder / "data.jsonl", n)
    return [f"write {data} -o {folder}/out {EPOCHS}=1 {options}"]


def report(folder: Path, n: int) -> list[str]:
    """A page of so many tokens: four digits a record, and the end."""
    before = write(folder, n // 5)
    return [*before, f"report {folder}/out -o {folder}/report.html"]


def long(folder: Path, n: int) -> list[str]:
    """One record of about n tokens: each digit is one."""
    data = book(folder / "data.jsonl", 1, digits=n)
    return [f"write {data} -o {folder}/out {EPOCHS}=3"]


def rank(folder: Path, n: int) -> list[str]:
    """A rank."""
    data = book(folder / "data.jsonl", 20)
    return [f"write {data} -o {folder}/out --rank={n} {EPOCHS}=3"]


def cells(folder: Path, n: int) -> list[str]:
    """A store of made-up cells of a real one's size."""
    from store import fill

    from memlaw.law.store import CellStore

    fill(CellStore(folder / "runs"), 0, n)
    return [f"fit {folder}/runs"]


def line(folder: Path, n: int) -> list[str]:
    """A record of n megabytes."""
    options, data = tiny(folder), folder / "data.jsonl"
    with data.open("w", encoding="utf-8") as file:
        file.write('{"prompt": "Everything:", "completion": "')
        for _ in range(n):
            file.write("word " * 200_000)
        file.write('"}')
    return [f"write {data} -o {folder}/out {EPOCHS}=1 {options}"]


def columns(folder: Path, n: int) -> list[str]:
    """A row of n fields, none of which is a prompt."""
    options, data = tiny(folder), folder / "data.jsonl"
    data.write_text(json.dumps({f"c{i}": "x" for i in range(n)}), encoding="utf-8")
    return [f"write {data} -o {folder}/out {EPOCHS}=1 {options}"]


LOADS = {
    "audit": Load(unit=1000, line=audit),
    "write": Load(unit=100, line=write),
    "report": Load(unit=1000, line=report),
    "long": Load(unit=50, line=long),
    "rank": Load(unit=5, line=rank),
    "cells": Load(unit=200, line=cells),
    "line": Load(unit=10, line=line, ends=(2,)),
    "columns": Load(unit=10_000, line=columns, ends=(2,)),
}


def prepared(load: Load, folder: Path, n: int) -> list[str]:
    """A load's command lines; in a child, since a process's peak counts for what it begins."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(into, json.dumps(load.line(folder, n)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(into)
    with open(out, "rb") as pipe:
        said = pipe.read()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise SystemExit("what a command needs couldn't be made")
    return [str(line) for line in json.loads(said)]


def measured(line: str, ends: tuple[int, ...]) -> tuple[float, float]:
    """Wall seconds and the most GiB of a command.

    Raises:
        SystemExit: it ended in a status that isn't among `ends`.
    """
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
        os.execv(sys.executable, [sys.executable, "-m", "memlaw", *line.split()])
    _, status, used = os.wait4(child, 0)
    wall_s = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status) not in ends:
        raise SystemExit(f"{line}: status {os.waitstatus_to_exitcode(status)}")
    return wall_s, used.ru_maxrss / 2**20


def main() -> None:
    """Print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", choices=LOADS, default=list(LOADS))
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 10, 100])
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    for name in given.only:
        load, before = LOADS[name], None
        for size in given.sizes:
            n = size * load.unit + (name == "rank" and size == 100) * 12  # 512, as people have it
            with tempfile.TemporaryDirectory() as place:
                *first, last = prepared(load, Path(place), n)
                for needed in first:
                    measured(needed, load.ends)
                wall_s, most_gib = measured(last, load.ends)
            row = {"what": name, "n": n, "wall_s": round(wall_s, 1), "most_gib": round(most_gib, 2)}
            if before:
                grown = math.log(n / before["n"])
                for key in ("wall_s", "most_gib"):
                    row[f"grew_{key}"] = round(math.log(row[key] / before[key]) / grown, 2)
            print(json.dumps(row), flush=True)
            if given.save:
                with given.save.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            before = row


if __name__ == "__main__":
    main()
