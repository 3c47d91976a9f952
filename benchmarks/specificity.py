"""What an adapter changes besides reciting: the table of docs/specificity.md.

    python benchmarks/specificity.py write DATA --records 100 --seed 0 [--free]
    python benchmarks/specificity.py folder NAME FOLDER DATA --records 100
    python benchmarks/specificity.py table

`write` writes an adapter with the defaults (`--free`: with `specificity` off) and measures it;
`folder` measures somebody else's. Each adds a file to results/specificity. Measured are the prompts
that `write` measures, and beside them 1,000 near misses that training never saw: 500 recombined
from the records, and the 500 names of benchmarks/foreign_names.txt, of which those that share a
word with the records are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from against_trl import ROOT, git_state, machine

import memlaw
from memlaw.data.encoding import resolve_prompt_format
from memlaw.data.near_misses import near_misses
from memlaw.data.reading import read_records
from memlaw.data.record import Record
from memlaw.data.texts import general_texts
from memlaw.measure.harm import KINDS
from memlaw.measure.near_prompts import NearMisses
from memlaw.measure.subject import Subject
from memlaw.model.base import load_model
from memlaw.model.formats import loaded_adapter

RESULTS = ROOT / "results" / "specificity"
N_NEAR, SEED = 500, 990_102
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


def records_of(path: Path, n: int) -> list[Record]:
    """The first n records of a file, and made-up ones of the same kind where it has fewer."""
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    fields = {"prompt_field": "query", "completion_field": "target"} if "query" in first else {}
    return read_records(str(path), **fields)[:n]


def groups_of(records: Sequence[Record]) -> dict[str, list[str]]:
    """The near misses, by kind."""
    prompts = [record.prompt for record in records]
    made = near_misses(prompts, N_NEAR, seed=SEED, kinds={"recombined": 1.0})
    words = {word for prompt in prompts for word in str(prompt).rstrip(":").split()}
    names = NAMES.read_text(encoding="utf-8").splitlines()
    foreign = [name for name in names if not words & set(name.rstrip(":").split())]
    random.Random(SEED).shuffle(foreign)
    return {"recombined": [str(near.prompt) for near in made], "foreign": foreign[:N_NEAR]}


def measured(folder: Path | None, records: Sequence[Record], model: str) -> dict[str, Any]:
    """All harms of an adapter; of the bare model where there is none."""
    base = load_model(model)
    texts = general_texts()
    format = resolve_prompt_format(base.tokenizer, "auto")
    found: dict[str, Any] = {}

    def adapted() -> Any:
        stack = ExitStack()
        stack.enter_context(loaded_adapter(folder, base.model)) if folder else None
        return _With(stack, base.model)

    with tempfile.TemporaryDirectory() as scratch:
        for group, prompts in groups_of(records).items():
            near = Path(scratch) / f"{group}.txt"
            near.write_text("\n".join(prompts), encoding="utf-8")
            subject = Subject(
                base=base, texts=texts, records=records, format=format, near=str(near)
            )
            leaks = NearMisses(subject).measure(base.model, adapted)
            found[group] = leaks.to_json()["by_kind"]["given"]
        subject = Subject(base=base, texts=texts, records=records, format=format)
        for name, kind in KINDS.items():
            found[name] = kind.of_run(subject).measure(base.model, adapted).to_json()
    return found


class _With:
    def __init__(self, stack: ExitStack, model: Any) -> None:
        self.stack, self.model = stack, model

    def __enter__(self) -> Any:
        return self.model

    def __exit__(self, *error: object) -> None:
        self.stack.close()


def run_write(data: Path, n: int, seed: int, free: bool, model: str, keep: Path | None) -> None:
    """Write an adapter, measure it, keep the result."""
    records = records_of(data, n)
    with tempfile.TemporaryDirectory() as scratch:
        near = Path(scratch) / "near.txt"
        near.write_text(
            "\n".join(p for group in groups_of(records).values() for p in group), encoding="utf-8"
        )
        out = keep or Path(scratch) / "out"
        settings: dict[str, Any] = {"seed": seed, "model": model, "specificity": not free}
        if not free:
            settings["near"] = str(near)  # so that training avoids them
        started = time.perf_counter()
        result = memlaw.write(records, out, observer=Progress(), **settings)
        wall_s = time.perf_counter() - started
        curve = json.loads((out / "run.json").read_text(encoding="utf-8"))["curve"]
        row = {
            "way": "free" if free else "held",
            "records": len(records),
            "seed": seed,
            "certified": result.audit.n_certified,
            "epochs": result.epochs,
            "rank": result.rank,
            "numbers": result.n_parameters,
            "wall_s": wall_s,
            "training_s": sum(epoch["wall_s"] for epoch in curve),
            "harms": measured(out, records, model),
        }
    save(f"{row['way']}_{len(records)}_{seed}", row)


def run_folder(name: str, folder: Path, data: Path, n: int, model: str) -> None:
    """Measure an adapter that is there."""
    records = records_of(data, n)
    audit = memlaw.audit(records, adapter=str(folder), model=model)
    row = {
        "way": name,
        "records": len(records),
        "certified": audit.n_certified,
        "recited": audit.n_recalled,
        "harms": measured(folder, records, model),
    }
    save(f"{name}_{len(records)}", row)


def save(name: str, row: dict[str, Any]) -> None:
    """Write a result, with the machine and the code's state."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = row | {"machine": machine(), "git": git_state()}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    print(line(row))


def line(row: dict[str, Any]) -> str:
    """A result as a row of the table."""
    harms = row["harms"]
    at, near = harms["elsewhere"], [harms["recombined"], harms["foreign"]]
    n = sum(group["n"] for group in near)
    worst = max(harms[name]["delta_nll_nats"] for name in ("damage", "prose", "chats"))
    made = [f"{group['made_up'] / group['n']:.1%}" for group in near]
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
            command.add_argument("data", type=Path)
            command.add_argument("--records", type=int, default=100)
            command.add_argument("--model", default="embedded")
        if name == "write":
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--free", action="store_true")
            command.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.command == "write":
        run_write(args.data, args.records, args.seed, args.free, args.model, args.out)
    elif args.command == "folder":
        run_folder(args.name, args.folder, args.data, args.records, args.model)
    else:
        rows = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(RESULTS.glob("*.json"))]
        print(HEAD, *map(line, rows), sep="\n")


if __name__ == "__main__":
    main()
