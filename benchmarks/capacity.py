"""Where in the embedded model a trained number remembers most.

    python benchmarks/capacity.py run STORE      # every part of eight layers; half an hour a core
    python benchmarks/capacity.py publish STORE  # results/capacity: cells, table and figure
    python benchmarks/capacity.py table          # the published table as Markdown

Each cell is one of `memlaw probe --placement PART --layers DEPTH`, with the defaults, at ranks that
give every part about as many trainable numbers. They share a loaded model and its statistics of
general text, which is all that running them here saves.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from against_trl import ROOT

from memlaw.adapters import resolve_sites
from memlaw.cells import CellStore, read_cells
from memlaw.models import load_model
from memlaw.precondition import measure_general
from memlaw.probe import ProbeConfig, Prober, run_group

RESULTS = ROOT / "results" / "capacity"
DEPTHS = (1, 5, 9, 13, 17, 21, 25, 29)
RANKS = {  # for 2,304 trainable numbers (down_proj and up_proj: 2,112)
    "mlp": 2,
    "down_proj": 1,
    "up_proj": 1,
    "q_proj": 2,
    "k_proj": 3,
    "v_proj": 3,
    "o_proj": 2,
}
NAMES = {"mlp": "MLP block, in parallel", "down_proj": "MLP, down", "up_proj": "MLP, up"} | {
    f"{letter}_proj": f"attention, {word}"
    for letter, word in zip("qkvo", ("query", "key", "value", "output"), strict=True)
}
TASKS = {"noise": (96, (0, 1, 2)), "phonebook": (440, (0,))}
ONLY_MLP = ("mlp", "down_proj")  # of the phone book


class _Mapper(Prober):
    """A prober that looks up the statistics of general text."""

    known: dict[str, Any]

    def _moments(self) -> list[Any]:
        return [self.known[site.module] for site in self.sites]


def run(store: Path, task: str) -> None:
    """All cells of a task that the store hasn't."""
    base = load_model()
    length, seeds = TASKS[task]
    parts = [part for part in RANKS if task == "noise" or part in ONLY_MLP]
    known: dict[str, Any] = {}
    for depth in sorted(DEPTHS, key=lambda depth: abs(depth - 17)):
        for part in parts:
            config = ProbeConfig(
                task=task,
                ranks=(RANKS[part],),
                lengths=(length,),
                seeds=seeds,
                placement=part,
                layers=(depth,),
            )
            mapper = _Mapper(config, base=base)
            if not known:
                sites = [site for name in parts for site in resolve_sites(base.model, name, DEPTHS)]
                found = measure_general(base.model, sites, mapper.retained_windows, seed=0)
                known = dict(zip((site.module for site in sites), found, strict=True))
            mapper.known = known
            keys = {mapper.key(spec): spec for spec in mapper.specs()}
            done = CellStore(store).finished(keys, print)
            for group in mapper.groups([spec for key, spec in keys.items() if key not in done]):
                for spec, status, result in run_group(mapper, group, store):
                    bits = result.get("bits_per_parameter", 0.0)
                    print(task, depth, part, spec.seed, status, f"{bits:.3f}", flush=True)


def main() -> int:
    """Run, publish, or print the table."""
    if len(sys.argv) == 4 and sys.argv[1] == "run" and sys.argv[3] in TASKS:
        run(Path(sys.argv[2]), sys.argv[3])
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
