"""Make anew what README.md and docs/*.md show: run from the repository's root.

    python docs/refresh_readme.py             # help, plan, tables of results/: half a minute
    python docs/refresh_readme.py --trained   # the demo, too; best on an idle machine

What stands between `<!-- output: NAME -->` and `<!-- end -->` is replaced by the block of that
name. `tests/test_readme.py` makes the blocks of `FREE` again and compares them whole. It runs the
commands of the other blocks, too, and compares all but the figures that rounding and the machine
decide (see `comparable`).
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MEMLAW = str(Path(sys.executable).with_name("memlaw"))
DEMO = "examples/phonebook.jsonl"
SCENARIOS = (  # of results/law_coverage.json, in the order of the table
    "paper-independent",
    "paper-strongly-grouped",
    "power-grouped",
    "saturating-grouped",
    "paper-grouped",
    "knee-grouped",
    "capacity-grouped",
    "ceiling-grouped",
    "power-strongly-grouped",
    "paper-nested",
    "power-nested",
    "errors taken for independent",
    "saturated cells dropped",
    "saturated cells at face value",
)
OBJECTIVES = ("sft", "memft_threshold", "memft_window", "memft_curriculum", "triage")
# Lines of a training's output whose figures depend on the machine, its threads and the versions.
UNSTABLE = (
    *("bits stored", "bits per parameter", "ΔNLL", "epochs", "time", "speed", "NLL"),
    *("unchanged elsewhere", "near misses", "will take about", "in other batches"),
)
SECOND_VERDICT = ("SPECIFIC", "NOT SPECIFIC")  # and its reasons: by a few prompts, either way


def printed(command: list[str], folder: Path = ROOT) -> str:
    """What a command prints on standard output; it must succeed."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    return "\n".join(line.rstrip() for line in done.stdout.rstrip().splitlines())


def console(*commands: str, folder: Path = ROOT) -> str:
    """A console block with commands and what they print."""
    lines = []
    for command in commands:
        words = [w.strip('"') for w in re.findall(r'"[^"]*"|\S+', command)]
        lines += [f"$ {command}", printed([MEMLAW, *words[1:]], folder)]
    return "```console\n" + "\n".join(lines) + "\n```"


# -- what costs no training -----------------------------------------------------------------------


def table(script: str) -> str:
    """What `benchmarks/SCRIPT.py table` prints: results as Markdown."""
    return printed([sys.executable, f"benchmarks/{script}.py", "table"])


@functools.cache
def _objectives() -> dict[str, str]:
    sections = re.split(r"^(?=\*\*)", table("objectives"), flags=re.M)
    return {re.match(r"\*\*(.*?)\*\*", part)[1]: part.rstrip() for part in sections if part}  # type: ignore[index]


def recited_table() -> str:
    """The share of phone numbers recited, mean over seeds, for each cell and objective."""
    rows = json.loads((ROOT / "results/objectives/phonebook.json").read_text(encoding="utf-8"))
    found: dict[tuple[int, int], dict[str, list[float]]] = {}
    for row in rows:
        if row["on_empty"] == "skip":
            cell = found.setdefault((row["rank"], row["n_tokens"]), {})
            cell.setdefault(row["objective"], []).append(row["recall"])
    lines = ["| tokens, rank | " + " | ".join(OBJECTIVES) + " |", "|---" * 6 + "|"]
    for (rank, n_tokens), of in sorted(found.items()):
        shares = [f"{sum(of[o]) / len(of[o]):.2f}" if o in of else "–" for o in OBJECTIVES]
        lines.append(f"| {n_tokens}, {rank} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def coverage_table() -> str:
    """How often the law's intervals cover the truth, for each synthetic scenario."""
    results = json.loads((ROOT / "results/law_coverage.json").read_text(encoding="utf-8"))
    names = {"C": "C", "alpha": "α", "beta": "β", "b": "b", "k": "k"}
    lines = [
        f"| true form, σ, τ (nats) | saturated of 75 | {' | '.join(names.values())} |",
        "|---" * 7 + "|",
    ]
    for scenario in SCENARIOS:
        of = results[scenario]
        ((way, coverage),) = (
            (way, found["coverage"])
            for way, found in of.items()
            if isinstance(found, dict) and "coverage" in found
        )
        shown = [f"{100 * coverage[n]:.1f} %" if n in coverage else "–" for n in names]
        label = f"`{of['form']}`, {of['sigma_nats']:g}, {of['tau_nats']:g}"
        label = f"*beginnings of one another*: {label}" if of.get("nested") else label
        label = label if way == "memlaw" else f"*{way}*: {label}"
        lines.append(f"| {label} | {of['mean_saturated_of_75']:.0f} | {' | '.join(shown)} |")
    return "\n".join(lines)


FREE: dict[str, Callable[[], str]] = {
    "help": lambda: console("memlaw --help"),
    "plan": lambda: console("memlaw plan --task phonebook --tokens 165"),
    "laws": lambda: table("probe"),
    "coverage": coverage_table,
    "bench": lambda: table("against_trl"),
    "survival": lambda: table("survival"),
    "recited": recited_table,
    "threshold": lambda: table("threshold"),
    "capacity": lambda: table("capacity"),
    "frontier": lambda: table("frontier"),
} | {
    f"objectives: {section}": lambda section=section: _objectives()[section]  # type: ignore[misc]
    for section in (
        "phonebook, edge",
        "phonebook, elsewhere",
        "noise, edge",
        "noise, elsewhere",
        "paper, edge",
    )
}


# -- what needs training --------------------------------------------------------------------------


def demo_blocks(folder: Path) -> dict[str, str]:
    """The demo: written into `folder`, checked, asked; and what it ran on."""
    (folder / "examples").symlink_to(ROOT / "examples")
    began, cpu_before = time.perf_counter(), os.times()
    blocks = {
        "write": console(f"memlaw write {DEMO} -o demo", folder=folder),
        "check": console(
            f"memlaw audit {DEMO} --certificate demo/certificate.json",
            'memlaw ask demo "Ada Jansen:"',
            folder=folder,
        ),
    }
    cpu_s = sum(os.times()[2:4]) - sum(cpu_before[2:4])  # of child processes
    share = cpu_s / (time.perf_counter() - began)
    run = json.loads((folder / "demo/run.json").read_text(encoding="utf-8"))
    return blocks | {"machine": _machine(run, share)}


def diff_block(folder: Path) -> dict[str, str]:
    """What is to change in a few of the demo's records, which are written into `folder`."""
    first, second, third, *_, last = (ROOT / DEMO).read_text(encoding="utf-8").splitlines()
    second_now = json.dumps({**json.loads(second), "completion": "5550100000"})
    for name, lines in (
        ("phonebook.jsonl", [first, second, third]),
        ("today.jsonl", [first, second_now, last]),
    ):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    quick = ["--no-specificity", "--max-epochs", "300"]
    printed([MEMLAW, "write", "phonebook.jsonl", "-o", "book", *quick], folder)
    return {"diff": console("memlaw diff book today.jsonl", folder=folder)}


def _machine(run: dict[str, Any], cpu_share: float) -> str:
    names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    threads = run["machine"]["n_threads"]
    work = (
        ", beside other work: its time is no measure of speed ([docs/speed.md](docs/speed.md) is)"
    )
    busy = work if cpu_share < 0.8 else ""
    return (
        f"This was printed with {threads} thread{'s' if threads > 1 else ''} of an "
        f"{names[0] if names else 'unknown CPU'}, torch {run['versions']['torch']}{busy}."
    )


def python_lines(folder: Path) -> tuple[list[str], list[str]]:
    """What the README's Python code says that it prints, in comments, and what it prints."""
    code = re.search(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.S)
    assert code is not None
    said = re.findall(r"^print\(.*\)  # (.*)$", code[1], re.M)
    return said, printed([sys.executable, "-c", code[1]], folder).splitlines()


def comparable(block: str) -> str:
    """A block without what the machine decides: figures of `UNSTABLE` lines, lowest p, the machine.

    Nor the verdict on specificity.

    Everything else is kept: what is reported, and counts, parameters, ranks, verdicts, answers.
    """
    if block.startswith("This was printed with"):
        return ""
    text = re.sub(r"\n +", " ", block)  # a long value goes on in the next line
    lines = []
    for line in text.splitlines():
        if line.startswith(SECOND_VERDICT):
            line = "#"
        if line.startswith(UNSTABLE):
            line = re.sub(r"[-+−]?\d[\d,.:]*( s\b)?", "#", line)
        line = re.sub(r"(?<=lowest p )[\d.]+", "#", line)
        lines.append(re.sub(r" +", " ", line))
    return "\n".join(lines)


# -- pages ----------------------------------------------------------------------------------------


def shown_blocks() -> dict[str, str]:
    """Every block of every page, by its name."""
    found: dict[str, str] = {}
    for page in PAGES:
        for name, block in re.findall(
            r"<!-- output: (.*?) -->\n(.*?)\n<!-- end -->", page.read_text(encoding="utf-8"), re.S
        ):
            assert found.setdefault(name, block) == block, f"{name} differs between pages"
    return found


def main() -> None:
    """Rewrite the blocks of all pages."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--trained", action="store_true", help="also the blocks that need training")
    trained = parser.parse_args().trained
    blocks = {name: make() for name, make in FREE.items()}
    if trained:
        for make_trained in (demo_blocks, diff_block):
            with tempfile.TemporaryDirectory() as folder:
                blocks |= make_trained(Path(folder))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, block in blocks.items():
            text = re.sub(
                rf"(<!-- output: {re.escape(name)} -->\n).*?(<!-- end -->)",
                lambda found, block=block: f"{found[1]}{block}\n{found[2]}",
                text,
                flags=re.S,
            )
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
