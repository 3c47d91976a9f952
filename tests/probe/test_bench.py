"""The same grid with each objective, on a tiny model."""

import dataclasses
import json
import math

import pytest

from memlaw import cli
from memlaw.core.errors import ConfigError
from memlaw.law.store import read_cells
from memlaw.probe.bench import VARIANTS, compare_objectives, with_objective
from memlaw.probe.compare import variant
from memlaw.settings.probe import ProbeConfig

GRID = {"task": "phonebook", "ranks": (1,), "lengths": (24, 48), "seeds": (0, 1), "steps": 12}


@pytest.fixture
def config(llama, texts):
    return ProbeConfig(model=str(llama), **texts, **GRID)


@pytest.mark.slow
def test_every_objective_runs_on_the_same_data(config, tmp_path):
    found = compare_objectives(tmp_path, config)
    rows = read_cells(tmp_path)
    assert len(rows) == len(VARIANTS) * 4
    assert {variant(row) for row in rows} == set(VARIANTS)
    assert found.n_failed == 0
    assert [c.objective for c in found.everywhere] == list(VARIANTS[1:])
    assert {c.n_seeds for c in found.everywhere} == {2}
    by_seed = {seed: {r["data_sha256"] for r in rows if r["seed"] == seed} for seed in (0, 1)}
    assert [len(of) for of in by_seed.values()] == [2, 2]  # one of each length
    assert not by_seed[0] & by_seed[1]
    assert all(math.isfinite(row["train_flop"]) and row["train_flop"] > 0 for row in rows)
    # what is there isn't run again
    again = compare_objectives(tmp_path, config)
    assert sum(result.n_run for result in again.results) == 0
    assert again.everywhere == found.everywhere


@pytest.mark.slow
def test_objectives_that_do_the_same_come_out_the_same(config, tmp_path):
    """As long as every token is under the line, MemFT's threshold is SFT."""
    slow = dataclasses.replace(config, learning_rate=1e-7)
    found = compare_objectives(tmp_path, slow, ("sft", "memft_threshold"))
    loss = found.everywhere[0].measures["loss"]
    assert loss.difference == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["sft:sft", "memft_threshold:skip", "dpo"])
def test_an_unknown_objective_is_refused(config, name):
    with pytest.raises(ConfigError, match="no objective"):
        with_objective(config, name)


def test_sft_is_what_all_are_compared_with(config, tmp_path):
    with pytest.raises(ConfigError, match="add sft"):
        compare_objectives(tmp_path, config, ("triage",))


@pytest.mark.slow
def test_the_command_line(llama, texts, tmp_path, capsys):
    command = ["bench", "objectives", "-o", str(tmp_path / "runs"), "--model", str(llama)]
    command += ["--retain", texts["retain"], "--damage-text", texts["damage_text"]]
    command += ["--ranks", "1", "--lengths", "24", "--seeds", "0,1", "--steps", "6"]
    command += ["--objectives", "sft", "triage"]
    assert cli.run(command) == 0
    shown = capsys.readouterr().out
    assert "on all cells (24 at rank 1); 2 seeds" in shown
    assert "records recited" in shown
    assert cli.run([*command, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["everywhere"][0]["objective"] == "triage"
    assert len(content["cells"]) == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bench"], "bench needs a name. There is objectives"),
        (["bench", "engines"], "no benchmark 'engines'. There is objectives"),
    ],
)
def test_a_bench_that_is_not_there(args, message, capsys):
    assert cli.run(args) == 2
    assert message in capsys.readouterr().err
