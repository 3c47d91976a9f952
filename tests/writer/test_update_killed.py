"""kill -9 at any moment of an update: the folder is the old generation or the new one."""

import json
import os
import shutil
import signal

import pytest

import memlaw

SETTINGS = {"specificity": False, "retention": 0, "max_epochs": 300}
# After what a child is killed, and which generation the folder is then.
MOMENTS = {
    "memlaw.writer.update_goals.UpdateGoals.after": 1,
    "memlaw.writer.handover.write_private": 1,
    "memlaw.writer.updating.keep_generations": 1,
    "memlaw.writer.updating.exchange": 2,
}


@pytest.fixture(scope="module")
def written(llama, phone_book, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("written") / "out"
    assert memlaw.write(phone_book, out, model=str(llama), **SETTINGS, **texts).certified
    return out


@pytest.fixture(scope="module")
def data(phone_book):
    return [*phone_book, ("Bo Ek:", "271828")]


def _killed(name, out, data, monkeypatch):
    """Update in a child that kills itself at the end of the first call of a function."""
    import importlib

    module, _, function = name.rpartition(".")
    owner_module, _, owner = module.rpartition(".")
    owner = (
        getattr(importlib.import_module(owner_module), owner)
        if owner[0].isupper()
        else importlib.import_module(module)
    )
    usual = getattr(owner, function)

    def killed(*args, **kwargs):
        usual(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(owner, function, killed)
            memlaw.update(out, data)
        finally:
            os._exit(1)  # not reached if it was killed
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def _generation(out, phone_book, data):
    """Which one the folder is: all that lies in it agrees."""
    run = json.loads((out / "run.json").read_text())
    number = len(run["generations"])
    records = {1: phone_book, 2: data}[number]
    assert memlaw.check_certificate(out / "certificate.json", records).holds
    assert memlaw.diff(out, records).nothing
    assert run["generations"][-1]["adapter_sha256"] == run["adapter"]["sha256"]
    return number


@pytest.mark.slow
def test_killed_at_each_step_it_is_one_of_the_two(written, phone_book, data, tmp_path, monkeypatch):
    """What was left behind is cleared away, and the same call again ends in the same bytes."""
    once = tmp_path / "once"
    shutil.copytree(written, once)
    assert memlaw.update(once, data).taken
    out = tmp_path / "out"
    shutil.copytree(written, out)
    for moment, generation in MOMENTS.items():
        _killed(moment, out, data, monkeypatch)
        assert len(list(tmp_path.iterdir())) == 3  # the work of the one that was killed
        assert _generation(out, phone_book, data) == generation, moment
    assert (out / "adapter_model.safetensors").read_bytes() == (
        once / "adapter_model.safetensors"
    ).read_bytes()
    assert memlaw.update(out, [*data, ("Cy:", "1")]).taken
    assert sorted(p.name for p in tmp_path.iterdir()) == ["once", "out"]
