"""Which objective remembers most: the published comparison, on the embedded model.

    python benchmarks/objectives.py run STORE [GRID]  # an hour or more a grid; goes on if stopped
    python benchmarks/objectives.py publish STORE     # results/objectives: cells, verdicts, figures
    python benchmarks/objectives.py table             # the published verdicts as Markdown
    python benchmarks/objectives.py stubborn OUT      # of a `memlaw write`: the last tokens to pass

Each grid is a `memlaw bench objectives` that can be run by itself; `run` prints the command. The
seeds are none that anything was tuned on.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from against_trl import ROOT, git_state, machine

from memlaw.law.store import CellStore, read_cells
from memlaw.probe.bench import VARIANTS
from memlaw.probe.compare import BASELINE, Comparison, at_the_edge, cell_of, compare, variant
from memlaw.train.snapshots import SNAPSHOTS_FILE, read_snapshots

RESULTS = ROOT / "results" / "objectives"
SEEDS = "10,11,12,13,14"
GRIDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "phonebook": (
        ["--task", "phonebook", "--ranks", "1,2", "--lengths", "132,198,264"],
        ("sft", "memft_threshold", "triage"),
    ),
    "less-room": (["--task", "phonebook", "--ranks", "1", "--lengths", "231"], ("sft", "triage")),
    "more": (["--task", "phonebook", "--ranks", "2", "--lengths", "330"], ("sft", "triage")),
    "variants": (["--task", "phonebook", "--ranks", "2", "--lengths", "264"], VARIANTS),
    "noise": (
        ["--task", "noise", "--ranks", "2,3", "--lengths", "64,128"],
        ("sft", "memft_threshold", "memft_window", "triage"),
    ),
    "paper": (
        [
            *("--task", "phonebook", "--recipe", "paper", "--ranks", "4", "--lengths", "132"),
            *("--steps", "400"),
        ],
        ("sft", "memft_threshold:sft"),
    ),
}
LINE, N_STUBBORN = 0.55, 8
KEPT = (
    *("task", "recipe", "placement", "layers", "length", "rank", "seed", "objective", "on_empty"),
    *("dtype", "base_sha256", "data_sha256", "learning_rate", "batch_size", "total_steps"),
    *("whiten", "retention", "n_records", "n_tokens", "n_parameters", "base_nll", "nll", "recall"),
    *("share_certified", "certified", "token_accuracy", "share_under", "verbatim_prefix"),
    *("steps_to_certificate", "n_steps", "train_flop", "relapses_per_token", "damage_nll"),
    *("damage_low", "damage_high", "bits_stored", "wall_s"),
)
SHOWN = ("records recited", "token accuracy", "verbatim prefix", "ΔNLL on unseen text", "TFLOP")


def main() -> int:
    """Run, publish, or print the table."""
    given = sys.argv[1:]
    if given == ["table"]:
        table()
    elif len(given) in (2, 3) and given[0] == "run":
        run(Path(given[1]), given[2:] or list(GRIDS))
    elif len(given) == 2 and given[0] == "publish":
        publish(Path(given[1]))
    elif len(given) == 2 and given[0] == "stubborn":
        stubborn(Path(given[1]))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


def run(store: Path, names: list[str]) -> None:
    """The grids, one after the other, into one store."""
    for name in names:
        grid, objectives = GRIDS[name]
        command = ["memlaw", "bench", "objectives", "-o", str(store), *grid]
        command += ["--seeds", SEEDS, "--objectives", *objectives]
        print("$", *command, flush=True)
        module = [sys.executable, "-c", "from memlaw.cli.dispatch import main; main()"]
        subprocess.run(module + command[1:], check=True)


def publish(store: Path) -> None:
    """Cells, comparisons and figures to results/objectives."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = [
        {name: _rounded(row[name]) for name in KEPT}
        for row in read_cells(store, print)
        if row["status"] == "success"
    ]
    verdicts: dict[str, Any] = {}
    for grid, of_grid in by_grid(rows).items():
        lines = ",\n".join(json.dumps(row) for row in of_grid)
        (RESULTS / f"{grid}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        verdicts[grid] = {
            title: [_as_json(comparison) for comparison in comparisons]
            for title, comparisons in compared(of_grid).items()
        }
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "machine": machine(1),
        "grids": verdicts,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    (RESULTS / "comparisons.json").write_text(text + "\n", encoding="utf-8")
    forest(verdicts)
    trajectories(store)


def by_grid(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The cells of each grid."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        grid = "paper" if row["recipe"] == "paper" else row["task"].partition(":")[0]
        found.setdefault(grid, []).append(row)
    return found


def compared(rows: list[dict[str, Any]]) -> dict[str, list[Comparison]]:
    """Each objective beside SFT: at the edge, and elsewhere."""
    edge = at_the_edge(rows)
    present = {variant(row) for row in rows}
    names = [name for name in VARIANTS if name in present and name != BASELINE]
    parts = {
        "edge": [row for row in rows if cell_of(row) in edge],
        "elsewhere": [row for row in rows if cell_of(row) not in edge],
    }
    return {
        title: [c for c in (compare(part, name) for name in names) if c is not None]
        for title, part in parts.items()
    }


def table() -> None:
    """The published comparisons."""
    content = json.loads((RESULTS / "comparisons.json").read_text(encoding="utf-8"))
    for grid, parts in content["grids"].items():
        for title, comparisons in parts.items():
            if not comparisons:
                continue
            first = comparisons[0]
            cells = ", ".join(f"{length} at rank {rank}" for _, length, rank in first["cells"])
            print(f"**{grid}, {title}** ({cells}; {first['n_seeds']} seeds)\n")
            print("| | " + " | ".join(SHOWN) + " | relapses a token |")
            print("|---" * (len(SHOWN) + 2) + "|")
            of = first["measures"]
            means = [f"{of[name]['baseline_mean']:.3g}" for name in (*SHOWN, "relapses a token")]
            print("| sft | " + " | ".join(means) + " |")
            for comparison in comparisons:
                of, name = comparison["measures"], comparison["objective"]
                if comparison["cells"] != first["cells"]:
                    some = ", ".join(f"{n} at rank {r}" for _, n, r in comparison["cells"])
                    name = f"{name} ({some} only)"
                shown = [_change(of[measure]) for measure in SHOWN]
                shown.append(f"{of['relapses a token']['mean']:.3g}")
                print(f"| {name} | " + " | ".join(shown) + " |")
            print()


def _change(of: dict[str, Any]) -> str:
    if of["ratio"] is not None and of["ratio_low"] is not None:
        return f"× {of['ratio']:.2f} ({of['ratio_low']:.2f} to {of['ratio_high']:.2f})"
    if of["low"] is None:
        return f"{of['difference']:+.3g}"
    return f"{of['difference']:+.3g} ({of['low']:+.3g} to {of['high']:+.3g})"


def forest(verdicts: dict[str, Any]) -> None:
    """What each objective recites at the edge, in SFT's."""
    import altair as alt

    rows = [
        {
            "grid": grid,
            "objective": comparison["objective"],
            "ratio": of["ratio"],
            "low": of["ratio_low"],
            "high": of["ratio_high"],
        }
        for grid, parts in verdicts.items()
        for comparison in parts["edge"]
        for of in [comparison["measures"]["records recited" if grid != "noise" else MEASURE_OF_ONE]]
        if of["ratio"] is not None
    ]
    one = alt.Chart(alt.Data(values=[{"x": 1}])).mark_rule(strokeDash=[3, 3]).encode(x="x:Q")
    charts = []
    for grid in dict.fromkeys(row["grid"] for row in rows):
        of_grid = alt.Data(values=[row for row in rows if row["grid"] == grid])
        base = alt.Chart(of_grid).encode(y=alt.Y("objective:N", title=None))
        bars = base.mark_rule().encode(x="low:Q", x2="high:Q")
        points = base.mark_point(filled=True, size=70).encode(
            x=alt.X("ratio:Q", title="in SFT's (95 % interval over seeds)")
        )
        charts.append(alt.layer(one, bars, points).properties(width=360, title=TITLES[grid]))
    _save(alt.vconcat(*charts), "edge")


MEASURE_OF_ONE = "token accuracy"
TITLES = {
    "phonebook": "Phone book: records recited where SFT recites 5 to 95 %",
    "noise": "Random tokens: token accuracy where SFT's is 5 to 95 %",
    "paper": "Phone book, the paper's recipe: records recited",
}


def trajectories(store: Path) -> None:
    """Tokens under the line, records over it, and relapses, step by step, at the edge."""
    import altair as alt

    points: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for cell in CellStore(store).read()[0]:
        config = cell["config"]
        place = config["task"], config["length"], config["rank"], config["recipe"]
        if cell["status"] != "success" or place != ("phonebook", 264, 2, "default"):
            continue
        name = variant(config | config["training"])
        for epoch in cell["curve"]:
            points.setdefault((name, 10 * round(epoch["n_steps"] / 10)), []).append(epoch)
    rows = [
        {
            "objective": name,
            "step": step,
            "tokens under the line": statistics.mean(e["n_under"] for e in epochs),
            "records over it": statistics.mean(e["n_records_over"] for e in epochs),
            "tokens fallen back since the last look": statistics.mean(
                e["n_relapses"] for e in epochs
            ),
        }
        for (name, step), epochs in points.items()
    ]
    if not rows:
        return
    base = alt.Chart(alt.Data(values=rows)).mark_line()
    charts = [
        base.encode(x="step:Q", y=f"{measure}:Q", color="objective:N").properties(width=250)
        for measure in list(rows[0])[2:]
    ]
    _save(alt.hconcat(*charts), "trajectories")


def stubborn(out: Path) -> None:
    """p of the tokens that were the last to stay over the line, epoch by epoch."""
    import altair as alt

    kept = read_snapshots(out / SNAPSHOTS_FILE)
    p = np.stack(kept.p).astype(float)  # [epochs, tokens]
    last_under = np.where(p < LINE, np.arange(len(p))[:, None], -1).max(axis=0)
    relapses = ((p[:-1] >= LINE) & (p[1:] < LINE)).sum()
    print(f"{p.shape[1]} tokens, {len(p)} epochs, {relapses / p.shape[1]:.2f} relapses a token")
    chosen = np.argsort(last_under)[-N_STUBBORN:]
    rows = [
        {"epoch": epoch, "p": p[i, token], "token": int(token)}
        for i, epoch in enumerate(kept.epochs)
        for token in chosen
    ]
    lines = (
        alt.Chart(alt.Data(values=rows))
        .mark_line()
        .encode(x="epoch:Q", y=alt.Y("p:Q", title="p of the token"), color="token:N")
    )
    rule = alt.Chart(alt.Data(values=[{"y": LINE}])).mark_rule(strokeDash=[3, 3]).encode(y="y:Q")
    _save((lines + rule).properties(width=480, height=240), "stubborn")


def _save(chart: Any, name: str) -> None:
    chart.save(RESULTS / f"{name}.png", scale_factor=2)
    chart.save(RESULTS / f"{name}.svg")


def _as_json(comparison: Comparison) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(comparison)), parse_float=lambda s: _rounded(float(s)))


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
