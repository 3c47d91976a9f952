"""Where in the embedded model a trained number remembers most.

    python benchmarks/capacity.py run STORE noise      # an hour of a core
    python benchmarks/capacity.py run STORE phonebook  # two parts of each
    python benchmarks/capacity.py publish STORE        # results/capacity: cells and figure
    python benchmarks/capacity.py table                # the published maps as Markdown

Each cell is one of `memlaw probe --placement PART --layers DEPTH`, with the defaults but without
measuring damage, at ranks that give every part about as many trainable numbers. They share a loaded
model and its statistics of general text, which is all that running them here saves.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from against_trl import ROOT

from memlaw.law.store import CellStore, read_cells
from memlaw.model.base import load_model
from memlaw.model.sites import resolve_sites
from memlaw.probe.prober import Prober
from memlaw.probe.run import run_group
from memlaw.settings.probe import ProbeConfig
from memlaw.train.precondition import measure_general

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
TASKS = {"noise": (96, (0,)), "phonebook": (440, (0,))}
KEPT = (
    *("task", "placement", "layers", "rank", "length", "seed", "n_records", "n_tokens"),
    *("n_parameters", "base_nll", "nll", "bits_stored", "bits_per_parameter", "token_accuracy"),
    *("recall", "steps", "recipe", "dtype", "wall_s"),
)
ONLY_MLP = ("mlp", "down_proj")  # of the phone book


class _Mapper(Prober):
    """A prober that looks up the statistics of general text."""

    known: dict[str, Any]

    def _moments(self) -> list[Any]:
        return [self.known[site.module] for site in self.sites]

    def _damage(self, adapter: Any) -> dict[str, float]:
        return {}  # `memlaw probe` measures it; a map of capacity does without


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


def publish(store: Path) -> None:
    """Cells and figure to results/capacity."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = [
        {name: row[name] for name in KEPT}
        for row in read_cells(store, print)
        if row["status"] == "success"
    ]
    lines = ",\n".join(json.dumps(row) for row in rows)
    (RESULTS / "map.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    picture(rows)


def picture(rows: list[dict[str, Any]]) -> None:
    """The map of noise as a heat map, bits stored for each trainable number in each square."""
    import altair as alt

    found = [
        {"layer": depth, "part": NAMES[part], "bits": statistics.mean(bits)}
        for (task, part, depth), bits in by_place(rows).items()
        if task == "noise:1"
    ]
    base = alt.Chart(alt.Data(values=found)).encode(
        x=alt.X("layer:O", title="decoder layer (of 30)"),
        y=alt.Y("part:N", title=None, sort=list(NAMES.values())),
    )
    scale = alt.Scale(scheme="viridis", domainMin=0)
    squares = base.mark_rect().encode(color=alt.Color("bits:Q", title="bits a number", scale=scale))
    numbers = base.mark_text().encode(
        text=alt.Text("bits:Q", format=".2f"),
        color=alt.condition("datum.bits > 0.4", alt.value("black"), alt.value("white")),
    )
    chart = (squares + numbers).properties(
        width=440,
        height=260,
        title="Bits stored for each trainable number: 96 random tokens, 150 steps",
    )
    chart.save(RESULTS / "map.png", scale_factor=2)
    chart.save(RESULTS / "map.svg")


def by_place(rows: list[dict[str, Any]]) -> dict[tuple[str, str, int], list[float]]:
    """Bits for each trainable number of each task, part and layer: one figure a seed."""
    found: dict[tuple[str, str, int], list[float]] = {}
    for row in rows:
        place = row["task"], row["placement"], row["layers"][0]
        found.setdefault(place, []).append(row["bits_per_parameter"])
    return found


def table() -> None:
    """The published maps: means, and what seeds differ by."""
    rows = json.loads((RESULTS / "map.json").read_text(encoding="utf-8"))
    places = by_place(rows)
    for task in dict.fromkeys(task for task, _, _ in places):
        print(f"{task}, bits for each trainable number, mean of seeds:\n")
        print("| | " + " | ".join(f"layer {depth}" for depth in DEPTHS) + " |")
        print("|---" * (len(DEPTHS) + 1) + "|")
        for part, name in NAMES.items():
            means = [statistics.mean(places.get((task, part, d), [math.nan])) for d in DEPTHS]
            if not math.isnan(means[0]):
                print(f"| {name} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
        spreads = [statistics.stdev(b) for (t, *_), b in places.items() if t == task and b[1:]]
        if spreads:
            print(f"\nStandard deviation between seeds: {statistics.median(spreads):.3f}, median.")
        print()


def main() -> int:
    """Run, publish, or print the table."""
    if sys.argv[1:] == ["table"]:
        table()
        return 0
    if len(sys.argv) == 4 and sys.argv[1] == "run" and sys.argv[3] in TASKS:
        run(Path(sys.argv[2]), sys.argv[3])
        return 0
    if len(sys.argv) == 3 and sys.argv[1] == "publish":
        publish(Path(sys.argv[2]))
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
