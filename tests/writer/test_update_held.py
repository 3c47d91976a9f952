"""An update of a folder that was written with specificity: held, gated, and certified likewise."""

import json
import shutil

import pytest
import torch

import memlaw
from memlaw.data.bad_rows import BadRows
from memlaw.data.texts import general_texts
from memlaw.model.base import load_model
from memlaw.model.formats import saved_factors
from memlaw.settings.recipe import RECIPE
from memlaw.train.keeping import HELD
from memlaw.writer.private import read_learner
from memlaw.writer.state import Run
from memlaw.writer.warm import start_warm

EASY = {"retention": 3.0, "max_epochs": 300, "dtype": "float32", "rank": 32, "layers": (1, 2)}
ADDED = ("Bo Ek:", "271828")


@pytest.fixture(scope="module")
def written(llama, phone_book, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("held") / "out"
    assert memlaw.write(phone_book, out, model=str(llama), **EASY, **texts).certified
    return out


@pytest.fixture
def started(llama, phone_book, texts, tmp_path):
    """What an update of a folder that adds a record begins with."""

    def start(folder, max_rank):
        run = Run(
            records=memlaw.read_records([*phone_book, ADDED]),
            bad=BadRows(),
            texts=general_texts(**texts),
            base=load_model(llama, dtype="float32"),
            config=memlaw.WriteConfig(
                model=str(llama), max_rank=max_rank, **EASY | texts | {"rank": "auto"}
            ).resolved(),
            out=tmp_path,
            observer=memlaw.Observer(),
        )
        start_warm(run, folder, {r.sha256 for r in memlaw.read_records(phone_book)})
        return run

    return start


@pytest.mark.slow
def test_what_is_written_stands_still_and_the_gate_with_it(written, phone_book, started):
    run = started(written, max_rank=64)
    learner, holding = run.learner, run.learner.holding
    saved = saved_factors(written, run.sites)
    rank = saved[0][0].shape[1]
    assert learner.keeping.still == rank < learner.adapter.rank
    assert holding.gate == rank - 1
    _, values = read_learner(written)
    assert holding.push == values["push"] >= 1
    assert holding.extra == RECIPE.extra_warm
    assert holding.is_warm
    assert (learner.keeping.rate, learner.keeping.calm) == (HELD, HELD)
    for i, (was_a, was_b) in enumerate(saved):
        a, b = learner.adapter.factors(i)
        assert torch.allclose(a @ b, was_a @ was_b, atol=1e-4)
    assert learner.rows.tolist() == [len(phone_book)]
    adapter = learner.adapter
    started = [[p.detach().clone() for p in factors] for factors in (adapter.a, adapter.b)]
    assert [m.shape for m in holding.mean] == [p.shape for p in adapter.parameters()]
    run.trainer.run_epoch()
    for a, was in zip(adapter.a, started[0], strict=True):
        assert torch.equal(a[:, :rank], was[:, :rank])
    for b, was in zip(adapter.b, started[1], strict=True):
        assert torch.equal(b[:rank], was[:rank])
        assert not torch.equal(b[rank:], was[rank:])


@pytest.mark.slow
def test_a_gate_that_nobody_knows_of_is_left_a_column(written, started, tmp_path):
    out = tmp_path / "written"
    shutil.copytree(written, out)
    (out / "private" / "learner.safetensors").unlink()
    run = started(out, max_rank=60)
    assert run.learner.holding.gate is None
    assert run.learner.adapter.rank == 59


@pytest.mark.slow
def test_a_held_folder_is_updated(written, phone_book, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(written, out)
    data = [*phone_book[1:], ADDED]
    result = memlaw.update(out, data)
    assert result.taken
    assert result.forgotten[0].holds
    assert set(result.written.harms) == {"damage", "prose", "chats", "elsewhere", "near_misses"}
    assert memlaw.diff(out, data).nothing
    assert memlaw.ask(out, ADDED[0]).text == ADDED[1]
    _, second = json.loads((out / "run.json").read_text())["generations"]
    assert second["removed"] == 1
    assert second["specific"] is not None
