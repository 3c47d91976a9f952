"""The published probe of the embedded model: grids of cells, their laws, and whether plans hold.

    python benchmarks/probe.py run STORE       # the grids; an hour or two; goes on if stopped
    python benchmarks/probe.py verify STORE    # twelve plans, trained at the answer and half of it
    python benchmarks/probe.py table            # the published laws as Markdown
    python benchmarks/probe.py publish STORE   # results/probe, and the table in the package

Each grid is a `memlaw probe` that can be run by itself; `run` prints the commands.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from against_trl import ROOT, git_state, machine

from memlaw.law.fits import fit_store
from memlaw.law.forms import FORMS
from memlaw.law.plan import plan_rank
from memlaw.law.store import read_cells
from memlaw.probe.verify import verify_plan

RESULTS = ROOT / "results" / "probe"
BUILT_IN = ROOT / "src" / "memlaw" / "law" / "builtin_cells.json"
GRIDS = [
    ("noise:1", "1,2,3,4,6", "32,64,128,192,256", "0,1,2"),
    ("phonebook", "1,2,3,4,6", "66,132,198,264", "0,1"),
    ("noise:0.6", "1,2,4", "64,128,256", "0,1"),
    ("noise:0", "1,2,4", "64,128,256", "0,1"),
    ("noise:0.2", "1,2,4", "64,128,256", "0"),
    ("noise:0.4", "1,2,4", "64,128,256", "0"),
    ("noise:0.8", "1,2,4", "64,128,256", "0"),
]
SHOWN = "power"
PICTURED = ("noise-1", "phonebook", "noise-0.6")
N_PLANS = 12
PLANNED = {"noise:1": range(40, 257), "phonebook": range(77, 265, 11)}
_LEFT_OUT = ("key", "error", "curriculum_epochs", "retained_sha256", "unseen_sha256")


def main() -> int:
    """Run, verify, publish, or print the table."""
    if sys.argv[1:] == ["table"]:
        table()
        return 0
    if len(sys.argv) != 3 or sys.argv[1] not in ("run", "verify", "publish"):
        print(__doc__, file=sys.stderr)
        return 2
    {"run": run, "verify": verify, "publish": publish}[sys.argv[1]](Path(sys.argv[2]))
    return 0


def run(store: Path) -> None:
    """All the grids, one after the other, into one store."""
    for task, ranks, lengths, seeds in GRIDS:
        command = ["memlaw", "probe", "-o", str(store), "--task", task]
        command += ["--ranks", ranks, "--lengths", lengths, "--seeds", seeds]
        print("$", *command, flush=True)
        module = [sys.executable, "-c", "from memlaw.cli.dispatch import main; main()"]
        subprocess.run(module + command[1:], check=True)


def requests(cells: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """Task, tokens and seed of plans to check: drawn at random, none of them in the grid.

    Requests for rank 1 are drawn again: half of it is no rank.
    """
    draw = random.Random(0)
    probed = {(row["task"], row["length"]) for row in cells}
    found: list[tuple[str, int, int]] = []
    while len(found) < N_PLANS:
        task = draw.choice(sorted(PLANNED))
        n_tokens = draw.choice(PLANNED[task])
        if (task, n_tokens) in probed or any(r[:2] == (task, n_tokens) for r in found):
            continue
        if plan_rank(cells, n_tokens, where={"task": task}).rank > 1:
            found.append((task, n_tokens, 100 + len(found)))
    return found


def verify(store: Path) -> None:
    """Train at each plan's rank and at half of it, on data of a seed of its own."""
    cells = read_cells(store)
    path = RESULTS / "plans.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    checked = []
    for task, n_tokens, seed in requests(cells):
        plan = plan_rank(cells, n_tokens, where={"task": task})
        at_rank, at_half = verify_plan(cells, plan.rank, n_tokens, where={"task": task}, seed=seed)
        checked.append(
            {
                "task": task,
                "n_tokens": n_tokens,
                "seed": seed,
                "rank": plan.rank,
                "rank_interval": plan.rank_interval,
                "probability": plan.probability,
                "probability_at_half": plan.probability_at_half,
                "certified": at_rank["certified"],
                "share_under": at_rank["share_under"],
                "half": at_half["rank"],
                "half_certified": at_half["certified"],
                "half_share_under": at_half["share_under"],
            }
        )
        print(checked[-1], flush=True)
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "machine": machine(1),
        "n_certified": sum(c["certified"] for c in checked),
        "n_half_not_certified": sum(not c["half_certified"] for c in checked),
        "plans": checked,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def publish(store: Path) -> None:
    """Cells, laws and figures to results/probe, and the built-in table."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    cells = [_rounded(row) for row in read_cells(store) if row["status"] == "success"]
    wanted = {task for task, *_ in GRIDS}
    cells = [row for row in cells if row["task"] in wanted]
    _write_rows(RESULTS / "cells.json", cells)
    _write_rows(BUILT_IN, [row for row in cells if row["task"] in PLANNED])
    laws = {form: [fit.to_json() for fit in fit_store(cells, form=form)] for form in FORMS}
    (RESULTS / "laws.json").write_text(json.dumps(laws, indent=1) + "\n", encoding="utf-8")
    from memlaw.report import make_report

    figures = RESULTS / "figures"
    make_report([RESULTS / "cells.json"], figures, format="png")
    for file in figures.iterdir():  # every cell is in cells.json; of the pictures, the full grids'
        if file.suffix == ".md" or not any(f"-{task}-" in file.name for task in PICTURED):
            file.unlink()


def table() -> None:
    """The laws of each task side by side, and what became of the plans."""
    laws = json.loads((RESULTS / "laws.json").read_text(encoding="utf-8"))[SHOWN]
    cells = json.loads((RESULTS / "cells.json").read_text(encoding="utf-8"))
    seeds = {
        task: len({row["seed"] for row in cells if row["task"] == task})
        for task in {row["task"] for row in cells}
    }
    print(f"`{FORMS[SHOWN].equation}`, s the rank, ℓ target tokens; 95 % intervals:")
    print()
    print("| task | seeds | C | α | β | R² | of means | held-out length | rank for 128 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for fit in laws:
        law, recall = fit.get("law"), fit.get("recall")
        if law is None:
            print(f"| {fit['setting']['task']} | {' | '.join('–' * 8)} |")
            continue
        forms = {form["form"]: form for form in fit["comparison"]}
        held_out = forms[SHOWN]["held_out_length_error"] if SHOWN in forms else None
        shown = [
            fit["setting"]["task"],
            str(seeds[fit["setting"]["task"]]),
            *(_interval(law, name) for name in ("C", "alpha", "beta")),
            f"{law['r2']:.3f}",
            "–" if fit["r2_of_means"] is None else f"{fit['r2_of_means']:.3f}",
            "–" if held_out is None else f"{held_out:.1%}",
            "–" if recall is None else _threshold(recall),
        ]
        print("| " + " | ".join(shown) + " |")
    if not (RESULTS / "plans.json").is_file():
        return
    plans = json.loads((RESULTS / "plans.json").read_text(encoding="utf-8"))
    print()
    print(
        f"Of {len(plans['plans'])} plans for lengths not in the grid, {plans['n_certified']} held "
        f"at the rank given; half of it failed in {plans['n_half_not_certified']}."
    )


def _interval(law: dict[str, Any], name: str) -> str:
    low, high = ("∞" if end is None else f"{end:.3g}" for end in law["intervals"][name])
    return f"{law['params'][name]:.3g} ({low} to {high})"


def _threshold(recall: dict[str, Any]) -> str:
    """The law's median threshold at 128 tokens: its bend is left out, which is small there."""
    ratio = (128 / recall["centre_tokens"]) ** recall["params"]["gamma"]
    size = recall["params"]["size_at_centre"] * ratio
    return f"{size:.1f}"


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) else value
        for name, value in row.items()
        if name not in _LEFT_OUT
    }


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
