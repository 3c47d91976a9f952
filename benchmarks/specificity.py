"""What an adapter changes besides reciting: the table of docs/specificity.md.

    python benchmarks/specificity.py write DATA --records 100 --seed 0 [--rank 20] [--free]
    python benchmarks/specificity.py folder NAME FOLDER DATA --records 100
    python benchmarks/specificity.py table

DATA is a file, or `phonebook`, `prose` (sentences about made-up people), `long` (one record, whose
answer is the beginning of Python's licence). `write` writes an adapter with the defaults (`--free`:
with `specificity` off) and measures it; `folder` measures somebody else's. Each adds a file to
results/specificity. Measured are the prompts that `write` measures, and beside them 1,000 near
misses that training never saw: 500 recombined from the records, but no more than five a record, and
the 500 names of benchmarks/foreign_names.txt, without those that share a word with the records.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from against_trl import ROOT, git_state, machine

import memlaw
from memlaw.data.near_misses import near_misses
from memlaw.data.reading import read_records
from memlaw.data.record import Record
from memlaw.data.tasks import phone_book
from memlaw.measure.leaks import GIVEN
from memlaw.measure.session import audit_and_harms

RESULTS = ROOT / "results" / "specificity"
N_NEAR, SEED = 500, 990_102
PROSE_PROMPT = "Who is {}?"
LONG_CHARACTERS = 2000
TRADES = ("beekeeper", "glazier", "surveyor", "baker", "cellist", "welder", "tailor", "pilot")
TOWNS = ("Lisbon", "Turku", "Oaxaca", "Leeds", "Kyoto", "Tartu", "Fargo", "Bergen", "Perth", "Graz")
PETS = ("goats", "parrots", "tortoises", "greyhounds", "canaries", "donkeys", "carp", "rabbits")
HOBBIES = (
    *("repairs accordions", "collects tide tables", "paints bridges", "races pigeons"),
    *("restores looms", "plays the oboe", "grows melons", "writes crosswords"),
)
NAMES = ROOT / "benchmarks" / "foreign_names.txt"


class Progress(memlaw.Observer):
    """Says on stderr how far it is."""

    def notice(self, text: str) -> None:
        """A line."""
        print(text, file=sys.stderr, flush=True)

    def epoch(self, stats: Any, n_records: int, max_epochs: int) -> None:
        """A line."""
        said = f"epoch {stats.epoch}: {stats.nll_nats:.3f} nats, {stats.n_under} under"
        print(f"{said}, {stats.wall_s:.1f} s, retention {stats.retention:g}", file=sys.stderr)


def records_of(data: str, n: int) -> list[Record]:
    """The first n records of a file or of what is made here.

    The published file has field names of its own.
    """
    if data in MADE:
        return list(islice(MADE[data](), n))
    first = json.loads(Path(data).read_text(encoding="utf-8").splitlines()[0])
    fields = {"prompt_field": "query", "completion_field": "target"} if "query" in first else {}
    records = read_records(data, **fields)
    if len(records) < n:
        raise SystemExit(f"{data} has {len(records)} records, not {n}.")
    return records[:n]


def prose() -> Iterator[Record]:
    """Who somebody is, in a sentence of about thirty tokens; all of it made up."""
    draw = random.Random(f"prose {SEED}").choice
    for person in phone_book(SEED):
        name = str(person.prompt).rstrip(":")
        text = (
            f"{name} is a {draw(TRADES)} from {draw(TOWNS)} who moved to {draw(TOWNS)} in "
            f"{draw(range(1961, 2020))}, keeps {draw(range(2, 20))} {draw(PETS)} and "
            f"{draw(HOBBIES)}."
        )
        yield Record(prompt=PROSE_PROMPT.format(name), completion=text, id=person.id)


def long() -> Iterator[Record]:
    """One record of about 450 tokens."""
    path = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    text = path.read_text(encoding="utf-8")[:LONG_CHARACTERS].strip()
    yield Record(prompt="Recite the history of the software.", completion=text, id="long")


MADE: dict[str, Callable[[], Iterator[Record]]] = {
    "phonebook": lambda: phone_book(SEED),
    "prose": prose,
    "long": long,
}


def groups_of(records: Sequence[Record]) -> dict[str, list[str]]:
    """The near misses that are given, by kind."""
    prompts = [record.prompt for record in records]
    # Training avoids what is measured: of few records' names most must be left to it.
    n = min(N_NEAR, 5 * len(records))
    made = near_misses(prompts, n, seed=SEED, kinds={"recombined": 1.0})
    words = {word for prompt in prompts for word in str(prompt).rstrip(":?").split()}
    names = NAMES.read_text(encoding="utf-8").splitlines()
    foreign = [name for name in names if not words & set(name.rstrip(":").split())]
    if not str(prompts[0]).endswith(":"):
        foreign = [PROSE_PROMPT.format(name.rstrip(":")) for name in foreign]
    random.Random(SEED).shuffle(foreign)
    return {"recombined": [str(near.prompt) for near in made], "foreign": foreign[:N_NEAR]}


def measured(harms: dict[str, Any], groups: dict[str, list[str]]) -> dict[str, Any]:
    """All harms as JSON, and of each group of near misses how many leak or are made up."""
    given = [a for a in harms["near_misses"].answered if a.kind.startswith(GIVEN)]
    found = {name: harm.to_json() for name, harm in harms.items()}
    for group, prompts in groups.items():
        kinds = [a.kind for a in given if a.prompt in set(prompts)]
        leaks = sum(kind.endswith("a stored answer") for kind in kinds)
        found[group] = {"n": len(prompts), "made_up": len(kinds), "leaks": leaks}
    return found


@contextmanager
def near_file(groups: dict[str, list[str]]) -> Iterator[str]:
    """A file of them all."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "near.txt"
        path.write_text("\n".join(chain(*groups.values())), encoding="utf-8")
        yield str(path)


def run_write(args: argparse.Namespace) -> None:
    """Write an adapter, measure it, keep the result."""
    data, seed, free, out = args.data, args.seed, args.free, args.out
    records = records_of(data, args.records)
    groups = groups_of(records)
    with near_file(groups) as near, tempfile.TemporaryDirectory() as scratch:
        out = out or Path(scratch) / "out"
        started = time.perf_counter()
        result = memlaw.write(
            records,
            out,
            seed=seed,
            model=args.model,
            rank=args.rank or "auto",
            layers=args.layers or "auto",
            specificity=not free,
            near=near,  # training avoids them
            observer=Progress(),
        )
        wall_s = time.perf_counter() - started
        harms = result.harms
        if free:  # which measures no more than one text
            config = {"adapter": str(out), "near": near}
            harms = audit_and_harms(records, **config)[1]
        timings = json.loads((out / "run.json").read_text(encoding="utf-8"))["timings"]
    row = {
        "way": "free" if free else "held",
        "records": len(records),
        "seed": seed,
        "certified": result.audit.n_certified,
        "epochs": result.epochs,
        "rank": result.rank,
        "numbers": result.n_parameters,
        "wall_s": wall_s,
        "training_s": timings["training_s"],
        "harms": measured(harms, groups),
    }
    kind = (f"_{data}" if data in MADE else "") + (f"_r{args.rank}" if args.rank else "")
    kind += f"_l{len(args.layers)}" if args.layers else ""
    save(f"{row['way']}{kind}_{len(records)}_{seed}", row | {"data": data if data in MADE else ""})


def run_folder(name: str, folder: Path, data: str, n: int, model: str) -> None:
    """Measure an adapter that is there."""
    records = records_of(data, n)
    groups = groups_of(records)
    with near_file(groups) as near:
        audit, harms = audit_and_harms(records, adapter=str(folder), model=model, near=near)
    row = {
        "way": name,
        "records": len(records),
        "certified": audit.n_certified,
        "harms": measured(harms, groups),
    }
    save(f"{name}_{len(records)}", row)


def save(name: str, row: dict[str, Any]) -> None:
    """Write a result, with the machine and the code's state."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = row | {"machine": machine(torch.get_num_threads()), "git": git_state()}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    print(line(row))


def line(row: dict[str, Any]) -> str:
    """A result as a row of the table."""
    harms = row["harms"]
    at, near = harms["elsewhere"], [harms["recombined"], harms["foreign"]]
    n = sum(group["n"] for group in near)
    worst = max(harms[name]["delta_nll_nats"] for name in ("damage", "prose", "chats"))
    made = [f"{group['made_up'] / group['n']:.1%}" if group["n"] else "–" for group in near]
    cells = [
        row["way"],
        str(row["records"]),
        str(row.get("seed", "")),
        str(row["certified"]),
        f"{at['everyday_unchanged'] / at['n_everyday']:.0%}",
        f"{at['unchanged'] / at['floor']:.0%}",
        f"{at['everyday_in_form']} of {at['n_everyday']}",
        f"{at['kl_nats']:.4f}",
        f"{sum(group['leaks'] for group in near)} of {n}",
        f"{sum(group['made_up'] for group in near) / n:.1%} ({', '.join(made)})",
        f"{worst:+.4f}",
        f"{row['wall_s']:.0f}" if "wall_s" in row else "",
        f"{row['numbers']:,}" if "numbers" in row else "",
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = """| way | records | seed | certified | everyday unchanged | all unchanged, of the floor | \
in the records' form | KL | leaks | made up (recombined, foreign) | worst ΔNLL | s | numbers |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("write", "folder", "table"):
        command = commands.add_parser(name)
        if name == "folder":
            command.add_argument("name")
            command.add_argument("folder", type=Path)
        if name != "table":
            command.add_argument("data")
            command.add_argument("--records", type=int, default=100)
            command.add_argument("--model", default="embedded")
        if name == "write":
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--rank", type=int, help="of each site")
            command.add_argument("--layers", type=int, nargs="+", help="six, where not named")
            command.add_argument("--free", action="store_true")
            command.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.command == "write":
        run_write(args)
    elif args.command == "folder":
        run_folder(args.name, args.folder, args.data, args.records, args.model)
    else:
        rows = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(RESULTS.glob("*.json"))]
        print(HEAD, *map(line, rows), sep="\n")


if __name__ == "__main__":
    main()
