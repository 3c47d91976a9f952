"""The probe: a grid on a tiny model, stopped and resumed at will."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import time

import pyarrow.parquet as pq
import pytest
import torch

from memlaw import cli
from memlaw.cli.progress import ConsoleObserver
from memlaw.core.errors import ConfigError, DataError, ModelError, OutputError
from memlaw.core.observer import Observer, Spec
from memlaw.law.store import read_cells
from memlaw.probe import grid as grid_module
from memlaw.probe import prober as prober_module
from memlaw.probe import run as probe_module
from memlaw.probe.prober import Prober
from memlaw.probe.run import probe
from memlaw.settings.choices import ALIASES
from memlaw.settings.probe import ProbeConfig
from memlaw.train import cached
from memlaw.train.learner import DivergedError
from memlaw.train.trainer import AdapterBank

GRID = {"ranks": (1, 3), "lengths": (6, 10), "seeds": (0, 1), "steps": 12}


@pytest.fixture
def config(llama, texts):
    return ProbeConfig(model=str(llama), **texts, **GRID)


def _table(folder):
    """The table of a store, without what may differ from run to run."""
    return [{k: v for k, v in row.items() if k != "wall_s"} for row in read_cells(folder)]


@pytest.mark.slow
def test_a_cell_says_what_its_adapter_remembers(config, tmp_path):
    result = probe(tmp_path, config)
    assert (result.n_run, result.n_failed, len(result.cells)) == (8, 0, 8)
    for row in result.cells:
        tokens = pq.read_table(tmp_path / "cells" / f"{row['key']}.parquet").to_pydict()
        n = row["length"]
        assert len(tokens["p"]) == row["n_tokens"] == n
        assert row["nll"] == pytest.approx(sum(tokens["nll_nats"]) / n, rel=1e-5)
        assert row["delta_nll"] == pytest.approx(row["base_nll"] - row["nll"])
        assert row["delta_nll"] > 0.1
        right = [a == b for a, b in zip(tokens["token_id"], tokens["argmax_id"], strict=True)]
        assert row["token_accuracy"] == pytest.approx(sum(right) / n)
        first = right.index(False) if False in right else n
        assert row["verbatim_prefix"] == pytest.approx(first / n)
        assert row["recall"] == float(all(right))
        assert row["share_under"] == pytest.approx(sum(p < 0.55 for p in tokens["p"]) / n)
        assert row["certified"] == all(p >= 0.55 for p in tokens["p"])
        assert row["min_p"] == pytest.approx(min(tokens["p"]))
        assert row["bits_stored"] == pytest.approx(row["delta_nll"] * n / math.log(2), rel=1e-5)
        assert row["n_parameters"] == row["rank"] * (64 + 128)
        assert row["n_steps"] == 12
        assert row["damage_low"] < row["damage_nll"] < row["damage_high"]
        assert row["status"] == "success"
    (content,) = (json.loads((tmp_path / "cells" / f"{row['key']}.json").read_text()),)
    assert content["curve"][-1]["epoch"] == 12
    assert content["provenance"]["versions"]["torch"]
    assert len(content["provenance"]["trained_together"]) == 8 // 2


@pytest.mark.slow
def test_damage_and_results_are_what_the_whole_model_says(config, tmp_path, llama, texts):
    """One cell, retrained alone and measured the long way round."""
    from memlaw.data.texts import unseen_text
    from memlaw.measure.damage import measure_damage, windows

    (row,) = probe(
        tmp_path, dataclasses.replace(config, ranks=(3,), lengths=(10,), seeds=(1,))
    ).cells
    prober = Prober(config)
    spec = Spec(10, 3, 1)
    examples = list(prober.examples(10, 1))
    (learner,) = prober._learners([spec], examples, {(10, 1): [0]})
    bank = AdapterBank(prober._engine(examples), [learner])
    for _ in range(12):
        bank.run_epoch()
    text, name = unseen_text(texts["damage_text"])
    adapter = learner.adapter.folded()
    damage = measure_damage(
        prober.base.model,
        lambda: adapter.attached(prober.base.model),
        windows(prober.base.tokenizer, text, context=512),
        text_name=name,
        text=text,
    )
    assert row["damage_nll"] == pytest.approx(damage.delta_nll_nats, abs=1e-5)
    assert [row["damage_low"], row["damage_high"]] == pytest.approx(damage.delta_nll_ci95, abs=1e-5)
    assert abs(damage.delta_nll_nats) > 1e-4


@pytest.mark.slow
def test_only_what_is_missing_is_run(config, tmp_path):
    probe(tmp_path, dataclasses.replace(config, lengths=(6,)))
    before = {row["key"] for row in read_cells(tmp_path)}
    result = probe(tmp_path, config)
    assert result.n_run == 4
    assert before < {row["key"] for row in read_cells(tmp_path)}
    assert probe(tmp_path, config).n_run == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"steps": 13},
        {"task": "phonebook"},
        {"objective": "memft_threshold"},
        {"placement": "mlp"},
        {"layers": (1,)},
        {"learning_rate": 1e-3},
        {"whiten": False},
        {"retention": 1.0},
        {"batch_size": 1},
        {"on_empty": "sft"},
        {"decode": True},
        {"recipe": "paper"},
        {"prompt_format": "plain"},
        {"dtype": "bfloat16"},
    ],
)
def test_another_setting_is_another_cell(config, change):
    spec = Spec(12, 1, 0)
    assert Prober(config).identity(spec) != Prober(dataclasses.replace(config, **change)).identity(
        spec
    )


@pytest.mark.slow
def test_cells_that_are_trained_together_are_what_they_are_alone(config, tmp_path):
    together = probe(tmp_path / "a", config).cells
    for row in together:
        one = {"ranks": (row["rank"],), "lengths": (row["length"],), "seeds": (row["seed"],)}
        (alone,) = probe(tmp_path / "b", dataclasses.replace(config, **one)).cells
        assert alone["key"] == row["key"]
        assert alone["nll"] == pytest.approx(row["nll"], rel=1e-3)


@pytest.mark.slow
def test_a_diverging_cell_fails_alone_and_is_tried_again(config, tmp_path, monkeypatch):
    usual = prober_module.Learner.step

    def step(self):
        if self.adapter.rank == 3 and self.n_steps == 5:
            raise DivergedError("the loss is not finite at step 6.")
        usual(self)

    monkeypatch.setattr(prober_module.Learner, "step", step)
    result = probe(tmp_path, config)
    assert result.n_failed == 4
    assert {row["rank"] for row in result.cells if row["status"] == "failed"} == {3}
    monkeypatch.undo()
    again = probe(tmp_path, config)
    assert (again.n_run, again.n_failed) == (4, 0)


@pytest.mark.slow
def test_an_error_is_kept_with_its_traceback(config, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(prober_module, "audit_examples", broken)
    seen = []

    class Watch(Observer):
        def cell(self, spec, status, result):
            seen.append((status, result["error"].splitlines()[-1]))

    result = probe(tmp_path, config, observer=Watch())
    assert result.n_failed == 8
    assert set(seen) == {("failed", "RuntimeError: out of memory, say")}
    file = next((tmp_path / "cells").glob("*.json"))
    assert "Traceback" in json.loads(file.read_text())["error"]


@pytest.mark.slow
def test_a_figure_that_is_not_finite_fails_its_cell_alone(config, tmp_path, monkeypatch):
    usual = Prober._damage

    def damage(self, adapter):
        found = usual(self, adapter)
        return found | {"damage_nll": math.nan} if adapter.rank == 3 else found

    monkeypatch.setattr(Prober, "_damage", damage)
    result = probe(tmp_path, config)
    assert result.n_failed == 4
    (row, *_) = [row for row in result.cells if row["status"] == "failed"]
    assert row["error"] == "not finite after the last step: damage_nll"


def test_bad_requests_are_refused_before_anything_is_trained(config, tmp_path, texts):
    with pytest.raises(ConfigError, match="is the text to measure damage on"):
        probe(tmp_path, dataclasses.replace(config, damage_text=texts["retain"]))
    short = tmp_path / "short.txt"
    short.write_text("Short.")
    with pytest.raises(DataError, match="too short"):
        probe(tmp_path, dataclasses.replace(config, damage_text=str(short)))
    with pytest.raises(OutputError, match=r"short\.txt: no folder can be made or filled there"):
        probe(short / "runs", config)


@pytest.mark.parametrize("name", ["no/such/place", "./there", "/nor/there"])
def test_a_tokenizer_that_is_not_there_is_refused_and_leaves_nothing(
    config, tmp_path, monkeypatch, name
):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)  # would ask the hub
    with pytest.raises(ModelError, match=rf"^{re.escape(name)} does not exist. .*--tokenizer"):
        probe(tmp_path / "runs", dataclasses.replace(config, tokenizer=name))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_model_the_cached_engine_can_t_train_is_probed_on_the_plain_one(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(cached._Constant, "forward", lambda self, *_, **__: self.no_such_thing)
    said = []

    class Notes(Observer):
        def notice(self, text):
            said.append(text)

    small = dataclasses.replace(config, lengths=(6,), seeds=(0,))
    assert probe(tmp_path, small, observer=Notes()).n_failed == 0
    assert any("plain engine, which is slower" in line for line in said)
    assert not any("--engine" in line for line in said)  # probe has no such setting


def test_many_ranks_of_a_long_text_are_trained_in_parts(config, monkeypatch):
    monkeypatch.setattr(grid_module, "_MOST_TOKENS", 20)
    monkeypatch.setattr(grid_module, "_GROUP_TOKENS", 20)
    prober = Prober(dataclasses.replace(config, ranks=(1, 2, 3), seeds=(0,)))
    groups = prober.groups(prober.specs())
    ranks = [[spec.rank for spec in group] for group in groups]
    assert ranks == [[1, 2, 3], [1, 2], [3]]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_table(config, tmp_path):
    """Twenty kills -9 and more, then one run in peace."""
    config = dataclasses.replace(config, lengths=tuple(range(4, 44)), seeds=(0,), steps=6)
    draw = random.Random(0)
    folder = tmp_path / "killed"
    prober = Prober(config)  # what cells share is computed once: the kills shall hit the cells
    prober.moments()
    prober.unseen_damage()
    for spec in prober.specs():
        prober.identity(spec)
    kills, found, longest_s = 0, [], 0.8
    while kills < 20:
        child = os.fork()
        if child == 0:
            _sweep(prober, folder)
            os._exit(0)
        time.sleep(draw.uniform(0.0, longest_s))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL:
            kills += 1
            found.append(len(_table(folder)) if any(folder.glob("cells/*.json")) else 0)
            longest_s *= 1 if found[-1] else 1.2  # on a machine that has other things to do
        else:  # it was done before: begin again
            shutil.rmtree(folder)
    assert any(0 < n < 80 for n in found)
    assert all(n % 2 == 0 for n in found)  # the cells of a length come together
    _sweep(prober, folder)
    _sweep(prober, tmp_path / "undisturbed")
    assert _table(folder) == _table(tmp_path / "undisturbed")
    assert len(_table(folder)) == 80
    kept = [path.name for path in folder.iterdir() if not path.name.startswith(".work-")]
    assert kept == ["cells"]


def _sweep(prober, folder):
    """What `probe` does, with a prober that is there already."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(probe_module, "Prober", lambda *_: prober)
    try:
        probe(folder, prober.config)
    finally:
        monkeypatch.undo()


@pytest.mark.slow
def test_the_papers_recipe_is_the_published_probe(config, tmp_path):
    paper = dataclasses.replace(config, recipe="paper", steps=None)
    training = paper.training(seed=0, n_records=1, n_tokens=100)
    assert training.total_steps == 2000
    assert (training.dropout, training.schedule, training.whiten, training.retention) == (
        0.1,
        "linear",
        False,
        0.0,
    )
    assert (training.learning_rate, training.max_grad_norm, training.betas) == (
        1e-2,
        1.0,
        (0.9, 0.999),
    )
    book = dataclasses.replace(paper, task="phonebook")
    sizes = [(4000, 400, 4), (24_000, 2400, 8), (32_000, 3200, 16)]
    assert (training.on_empty, training.margin) == ("sft", 0.0)
    for n_tokens, n_records, batch_size in sizes:
        training = book.training(seed=0, n_records=n_records, n_tokens=n_tokens)
        assert training.batch_size == batch_size
        assert training.total_steps == 200 * n_records / batch_size
    short = dataclasses.replace(paper, steps=10, lengths=(6,), seeds=(0,))
    rows = probe(tmp_path, short).cells
    assert {row["placement"] for row in rows} == {"mlp"}
    assert {row["n_parameters"] for row in rows} == {2 * 64, 6 * 64}
    assert all(row["delta_nll"] > 0 for row in rows)


def test_with_a_linear_decay_the_last_step_hardly_moves(config):
    paper = dataclasses.replace(config, recipe="paper", steps=40, ranks=(3,))
    prober = Prober(paper)
    spec = Spec(10, 3, 0)
    examples = list(prober.examples(10, 0))
    (learner,) = prober._learners([spec], examples, {(10, 0): [0]})
    bank = AdapterBank(prober._engine(examples), [learner])
    moves = []
    for _ in range(40):
        before = learner.adapter.b[0].detach().clone()
        bank.run_epoch()
        moves.append(float((learner.adapter.b[0].detach() - before).norm()))
    assert moves[-1] < 0.1 * moves[0]
    rate = learner.solver.optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(1e-2 / 40)


def test_dropout_leaves_out_its_share_and_comes_back_the_same(llama):
    from memlaw.model.adapter import Adapter
    from memlaw.model.base import load_model
    from memlaw.model.sites import resolve_sites

    sites = resolve_sites(load_model(llama).model, "down_proj", (1,))
    adapter = Adapter(sites, rank=4, seed=0, dropout=0.25)
    with torch.no_grad():
        adapter.b[0].fill_(1.0)
    x = torch.randn(500, sites[0].d_in, generator=torch.Generator().manual_seed(0))
    whole = adapter.delta(sites[0].module, x)
    adapter.begin_step(3)
    first = adapter.delta(sites[0].module, x)
    dropped = (first == 0).float().mean()
    assert abs(dropped - 0.25) < 0.02
    kept = first != 0
    assert torch.allclose(first[kept], whole[kept] / 0.75)
    adapter.begin_step(4)
    assert not torch.equal(adapter.delta(sites[0].module, x), first)
    adapter.begin_step(3)
    assert torch.equal(adapter.delta(sites[0].module, x), first)
    assert torch.allclose(adapter.folded().delta(sites[0].module, x), whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": ()}, "give at least one"),
        ({"ranks": (0,)}, "1 or more"),
        ({"lengths": (1,)}, "2 or more"),
        ({"steps": 0}, "steps is 0"),
        ({"task": "x"}, "no task 'x'"),
        ({"objective": "x"}, "no objective 'x'"),
        ({"retention": -1.0}, "retention is -1"),
    ],
)
def test_a_setting_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        ProbeConfig(**settings)


def test_a_rank_beyond_the_model(config):
    with pytest.raises(ConfigError, match="rank 65 is out of range: 1 to 64"):
        Prober(dataclasses.replace(config, ranks=(1, 65)))


@pytest.mark.slow
def test_the_command_line(config, llama, texts, tmp_path, capsys):
    arguments = ["probe", "-o", str(tmp_path / "runs"), "--model", str(llama)]
    arguments += ["--ranks", "1,3", "--lengths=6,10", "--seeds", "0", "--steps", "5"]
    for name, path in texts.items():
        arguments += [f"--{name.replace('_', '-')}", path]
    assert cli.run(arguments) == 0
    said = capsys.readouterr().out
    assert "4 of 4 cells, 4 of them run now" in said
    assert cli.run([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["length"], row["rank"]) for row in rows] == [(6, 1), (6, 3), (10, 1), (10, 3)]
    assert cli.run(["probe", "-o", str(tmp_path), "--task", "poem"]) == 2
    assert "no task 'poem'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_probe_that_is_interrupted_keeps_what_is_finished(
    config, llama, texts, tmp_path, monkeypatch, capsys, name
):
    usual = ConsoleObserver.steps

    def epoch(self, specs, epoch, epochs, nll_nats):
        if specs[0].length == 10 and epoch == 2:
            signal.raise_signal(getattr(signal, name))
        usual(self, specs, epoch, epochs, nll_nats)

    out = tmp_path / "runs"
    arguments = ["probe", "-o", str(out), "--model", str(llama), "--ranks=1,3", "--lengths=6,10"]
    arguments += ["--steps=5", "--retain", texts["retain"], "--damage-text", texts["damage_text"]]
    on_terminate = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ConsoleObserver, "steps", epoch)
    try:
        assert cli.run(arguments) == 130
    finally:
        signal.signal(signal.SIGTERM, on_terminate)
    assert "The same command goes on with the cells that are missing" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["cells"]
    before = _table(out)
    assert [(row["length"], row["rank"], row["status"]) for row in before] == [
        (6, 1, "success"),
        (6, 3, "success"),
    ]
    monkeypatch.undo()
    assert cli.run(arguments) == 0
    assert "4 of 4 cells, 2 of them run now" in capsys.readouterr().out
    assert _table(out)[:2] == before


def test_aliases_of_objectives_are_understood():
    alias = next(iter(ALIASES))
    assert ProbeConfig(objective=alias).training(0, 1, 10).objective == ALIASES[alias]


def test_another_tokenizer_makes_other_cells(config, make_tokenizer, tmp_path):
    words = make_tokenizer("chat")
    words.chat_template = "Book.\n" + words.chat_template
    words.save_pretrained(tmp_path / "words")
    other = Prober(dataclasses.replace(config, tokenizer=str(tmp_path / "words")))
    assert other.base.tokenizer.chat_template == words.chat_template
    assert other.base.tokenizer_sha256 != Prober(config).base.tokenizer_sha256
    assert other.provenance([("a", 1)], 1.0)["tokenizer"] == str(tmp_path / "words")
