"""`memlaw fit` and `memlaw plan`: on stores of one task and of several, and without torch."""

import dataclasses
import json
import math
import random
import signal
import subprocess
import sys

import pytest

from memlaw import cli
from memlaw.core.errors import MemlawError
from memlaw.law.builtin import builtin_cells
from memlaw.law.fits import fit_store
from memlaw.law.plan import plan_rank
from memlaw.law.store import read_cells
from memlaw.probe.run import probe
from memlaw.probe.verify import verify_plan
from memlaw.settings.probe import ProbeConfig


def _cells(task="noise:1", alpha=0.9, beta=0.7, c=150.0, l0=12.0, noise=0.05):
    """A grid that follows a law, saturates, and certifies where hardly anything is left."""
    draw = random.Random(f"{task} {alpha}")
    rows = []
    for rank in (1, 2, 3, 4, 6):
        for length in (32, 64, 128, 192, 256):
            for seed in (0, 1):
                fall = c * rank**alpha * length**-beta + draw.gauss(0, noise)
                fall = min(fall, l0 - 0.05)
                rows.append(
                    {
                        "status": "success",
                        "task": task,
                        "rank": rank,
                        "length": length,
                        "n_tokens": length,
                        "seed": seed,
                        "n_parameters": rank * 2112,
                        "base_nll": l0,
                        "nll": l0 - fall,
                        "delta_nll": fall,
                        "saturated": l0 - fall < 0.05 * l0,
                        "certified": l0 - fall < 0.06 * l0,
                        "recall": float(l0 - fall < 0.06 * l0),
                        "share_under": min(1.0, (l0 - fall) / 4),
                        "wall_s": 0.1 * length + rank,
                        "placement": "down_proj",
                        "layers": [20],
                        "objective": "sft",
                        "recipe": "default",
                        "steps": 150,
                    }
                )
    return rows


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "cells.json"
    path.write_text(json.dumps(_cells() + _cells("phonebook", alpha=0.5, c=60.0)))
    return path


@pytest.mark.slow
def test_each_task_gets_its_law(store):
    fits = fit_store(read_cells(store), form="power")
    assert [fit.setting["task"] for fit in fits] == ["noise:1", "phonebook"]
    for fit, alpha in zip(fits, (0.9, 0.5), strict=True):
        low, high = fit.law.intervals_["alpha"]
        assert low < alpha < high
        assert high - low < 0.2
        assert fit.comparison[0].form in ("power", "paper", "knee", "ceiling")
        assert fit.n_cells == 50
        assert fit.recall.params_["size_at_centre"] > 1
        assert (fit.grid[0].rank, fit.grid[0].length) == (1, 32)
        for point in fit.grid:
            assert point.fitted == pytest.approx(point.delta_nll, abs=0.6)


@pytest.mark.slow
def test_the_tables_of_fit(store, capsys):
    assert cli.run(["fit", str(store)]) == 0
    said = capsys.readouterr().out
    assert "ΔL = C s^α ℓ^−β + b" in said
    assert "noise:1: down_proj of layer 20, default recipe, sft, 150 steps" in said
    assert "phonebook: down_proj" in said
    assert "256 tokens" in said
    first = [row["delta_nll"] for row in _cells() if (row["rank"], row["length"]) == (1, 32)]
    assert f"{sum(first) / len(first):.1f}" in said
    assert cli.run(["fit", str(store), "--task", "phonebook", "--form", "knee", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["law"]["form"] == "knee"
    assert found["law"]["params"]["alpha"] == pytest.approx(0.5, abs=0.1)
    assert found["setting"]["task"] == "phonebook"
    assert found["recall"]["intervals"]["gamma"][0] < found["recall"]["params"]["gamma"]


def test_too_few_cells_are_said_not_fitted(tmp_path, capsys):
    path = tmp_path / "few.json"
    path.write_text(json.dumps(_cells()[:3]))
    assert cli.run(["fit", str(path)]) == 2
    assert "memory law:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "nowhere"], "nowhere does not exist. Name a folder that 'memlaw probe -o' wrote"),
        (["fit", "."], ". holds no cells"),
        (
            ["plan", "STORE", "--task", "noise:1", "--tokens", "50", "--verify"],
            "don't say how they were trained (asked, model, dtype, device, decode",
        ),
        (["fit", "STORE", "--task", "poem"], "no task 'poem'. There are phonebook"),
        (["fit", "STORE", "--task", "noise:0.3"], "No finished cell of task noise:0.3"),
        (["plan", "STORE", "--where", "task", "--tokens", "5"], "write COLUMN=VALUE"),
        (["plan", "STORE", "--where", "task=x", "--tokens", "5"], "No cell has task 'x'"),
        (["plan", "STORE", "--tokens", "50"], "mix several values of task"),
        (["plan", "STORE"], "either --tokens (which rank?) or --rank"),
        (["plan", "STORE", "--tokens", "5", "--rank", "5"], "either --tokens"),
        (["plan", "STORE", "--task", "noise:1", "--tokens", "0"], "n_tokens is 0"),
    ],
)
def test_requests_that_can_t_be_met(store, arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = [str(store) if a == "STORE" else a for a in arguments]
    assert cli.run(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["fit"], ["plan", "--tokens", "50"], ["report"]])
def test_failed_cells_alone_are_nothing_to_show(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "failed.json"
    path.write_text(json.dumps([_cells()[0] | {"status": "failed"}]))
    assert cli.run([command[0], str(path), *command[1:]]) == 2
    assert "o finished cell among 1. Run the probe first" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["failed.json"]


@pytest.mark.parametrize("content", ["{", "{}", "[]", "[1]"])
def test_a_file_that_holds_no_cells(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(MemlawError, match=r"cells"):
        read_cells(path)


@pytest.mark.parametrize(
    ("command", "change", "message"),
    [
        (["fit"], {"delta_nll": math.nan}, "delta_nll nan, which is no number"),
        *(
            (command, change, message)
            for command in (["fit"], ["plan", "--tokens", "50"], ["report"])
            for change, message in (
                ({"rank": "x"}, "rank 'x', which is no number"),
                ({"rank": None}, "no rank: it isn't a finished probe cell"),
                ({"n_tokens": [1]}, "n_tokens [1], which is no number"),
            )
        ),
    ],
)
def test_a_row_that_is_no_cell_is_named(tmp_path, monkeypatch, capsys, command, change, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "odd.json"
    path.write_text(json.dumps([*_cells(), _cells()[0] | change]))
    assert cli.run([command[0], str(path), *command[1:]]) == 2
    assert message in capsys.readouterr().err


def test_a_plan_and_its_inverse(store, capsys):
    assert cli.run(["plan", str(store), "--task", "noise:1", "--tokens", "100", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    needed = ((12 * 0.94) / (150 * 100**-0.7)) ** (1 / 0.9)  # where the made-up cells certify
    assert math.ceil(needed) <= plan["rank"] <= math.ceil(needed) + 1
    assert plan["n_parameters"] == plan["rank"] * 2112
    assert plan["verified"] == []
    arguments = ["plan", str(store), "--task", "noise:1", "--rank", str(plan["rank"]), "--json"]
    assert cli.run(arguments) == 0
    back = json.loads(capsys.readouterr().out)
    assert back["n_tokens"] >= 100
    assert cli.run(["plan", str(store), "--task", "noise:1", "--tokens", "900"]) == 0
    assert "EXTRAPOLATES: 900 tokens is above everything probed" in capsys.readouterr().out


@pytest.mark.slow
def test_fit_and_plan_need_no_torch(store):
    script = (
        "from memlaw import cli\n"
        f"assert cli.run(['fit', {str(store)!r}, '--task', 'phonebook']) == 0\n"
        f"assert cli.run(['plan', {str(store)!r}, '--task', 'noise:1', '--tokens', '50']) == 0\n"
        "import sys; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_the_built_in_table_answers(capsys):
    tasks = {row["task"] for row in builtin_cells()}
    assert {"noise:1", "phonebook"} <= tasks
    assert cli.run(["plan", "--task", "noise:1", "--tokens", "100"]) == 0
    said = capsys.readouterr().out
    assert "built-in table: SmolLM2-135M-Instruct" in said
    plan = plan_rank(builtin_cells(), 100, where={"task": "noise:1"})
    assert plan.probability >= 0.9
    assert plan.extrapolates == ()


@pytest.fixture(scope="module")
def tiny_store(llama, tmp_path_factory):
    """A tiny model's cells, as `memlaw probe --json` prints them: rank 2 holds 6 tokens, not 10."""
    folder = tmp_path_factory.mktemp("tiny")
    config = ProbeConfig(
        model=str(llama),
        ranks=(1, 2, 8),
        lengths=(6, 10),
        seeds=(0, 1),
        steps=80,
        placement="mlp",
        layers=(1,),
        retention=0.0,
    )
    rows = probe(folder / "runs", config).cells
    held = {(row["rank"], row["length"]) for row in rows if row["certified"]}
    assert held == {(2, 6), (8, 6), (8, 10)}
    path = folder / "cells.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def usual_sigterm():
    """The command line takes SIGTERM for itself; give it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_a_plan_that_holds_is_a_hit(tiny_store, capsys):
    arguments = ["plan", str(tiny_store), "--tokens", "10", "--verify"]
    assert cli.run(arguments) == 0
    said = capsys.readouterr().out
    rank = plan_rank(read_cells(tiny_store), 10).rank
    assert 4 <= rank <= 8
    assert f"trained at rank {rank} on 10 tokens not seen before, 80 steps: 0.0%" in said
    assert f"trained at rank {rank // 2} on 10 tokens" in said
    assert said.endswith("HIT\n")


@pytest.mark.slow
def test_a_plan_that_does_not_hold_is_a_miss(tiny_store, tmp_path, capsys):
    rows = json.loads(tiny_store.read_text())
    for row in rows:
        row["certified"] = row["certified"] or row["rank"] == 2  # not so of 10 tokens
    path = tmp_path / "rosy.json"
    path.write_text(json.dumps(rows))
    assert cli.run(["plan", str(path), "--tokens", "10", "--verify"]) == 1
    assert capsys.readouterr().out.endswith("fails\nMISS\n")
    assert cli.run(["plan", str(path), "--tokens", "10", "--verify", "--json"]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert plan["rank"] == 3
    assert [(row["rank"], row["succeeded"]) for row in plan["verified"]] == [(3, False), (1, False)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_verification_that_is_interrupted_says_nothing_of_the_plan(
    tiny_store, tmp_path, monkeypatch, capsys, usual_sigterm, name
):
    def epoch(self, specs, epoch, epochs, nll_nats):
        signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr("memlaw.cli.progress.ConsoleObserver.steps", epoch)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli.run(["plan", str(tiny_store), "--tokens", "10", "--verify"]) == 130
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith("memlaw: interrupted.\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_plan_is_verified_on_data_not_seen(llama, tmp_path):
    config = ProbeConfig(
        model=str(llama), ranks=(1, 2, 8), lengths=(6, 12), seeds=(0, 1), steps=60, placement="mlp"
    )
    rows = probe(tmp_path, config).cells
    largest, half = verify_plan(rows, 8, 6)
    assert (largest["rank"], half["rank"]) == (8, 4)
    assert largest["seed"] == half["seed"] == 2
    assert largest["n_tokens"] == 6
    same = ("setting", "steps", "placement", "layers", "base_sha256", "learning_rate", "retention")
    assert all(largest[name] == rows[0][name] for name in same)
    # the same data and settings give the same adapter
    seen = dataclasses.replace(config, ranks=(8, 4), lengths=(6,), seeds=(0,))
    again = verify_plan(rows, 8, 6, seed=0)
    assert [row["key"] for row in again] == [
        row["key"] for row in sorted(probe(tmp_path, seen).cells, key=lambda row: -row["rank"])
    ]
