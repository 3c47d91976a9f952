"""Interrupted runs: nothing half-written is left, and going on ends where one run would have."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from safetensors.torch import load_file

import memlaw
from memlaw import cli
from memlaw.core.errors import ConfigError, OutputError

EPOCHS = 12
SETTINGS = {"rank": 4, "batch_size": 3, "learning_rate": 1e-3, "max_epochs": EPOCHS}
OBJECTIVES = {
    "sft": {"objective": "sft"},
    "triage": {"objective": "triage"},  # gives records up on the way
    "memft_window": {"objective": "memft_window"},  # carries state from epoch to epoch
    "memft_curriculum": {"objective": "memft_curriculum", "curriculum_epochs": (2, 4, 6, 8)},
    # so slow that the rank is raised on the way
    "a rank that grows": {"rank": "auto", "max_rank": 32, "learning_rate": 1e-9, "max_epochs": 50},
}
STOPS = ("exception", "killed")


class Stop(memlaw.Observer):
    """Ends the run after an epoch: as Ctrl-C does, or as a power cut does."""

    def __init__(self, after, how):
        self.after, self.how = after, how

    def epoch(self, stats, n_records, max_epochs):
        if stats.epoch == self.after:
            if self.how == "killed":
                os._exit(9)
            raise KeyboardInterrupt


def _write(book, out, model, **settings):
    return memlaw.write(book, out, model=str(model), **{"specificity": False} | settings)


def _stopped(book, out, model, settings, *, after, how):
    """Run and be stopped after an epoch; killed runs go in a child process."""
    observer = Stop(after, how)
    if how == "exception":
        with pytest.raises(KeyboardInterrupt):
            _write(book, out, model, observer=observer, **settings)
        return
    child = os.fork()
    if child == 0:
        try:
            _write(book, out, model, observer=observer, **settings)
        finally:
            os._exit(1)  # not reached if the observer did its work
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def _adapter(out):
    return (out / "adapter_model.safetensors").read_bytes()


@pytest.fixture(autouse=True)
def checkpoint_every_epoch(monkeypatch):
    """Not every few seconds, so that short runs have something to lose."""
    monkeypatch.setattr("memlaw.writer.run._CHECKPOINT_EVERY_S", 0.0)


@pytest.fixture(scope="module")
def uninterrupted(llama, phone_book, tmp_path_factory):
    """The adapter file of a run that nobody stopped, for each objective."""
    done = {}

    def weights(objective):
        if objective not in done:
            out = tmp_path_factory.mktemp("whole") / "out"
            _write(phone_book, out, llama, **SETTINGS | OBJECTIVES[objective])
            done[objective] = _adapter(out)
        return done[objective]

    return weights


@pytest.mark.slow
@pytest.mark.parametrize("how", STOPS)
@pytest.mark.parametrize("after", [2, 7])
@pytest.mark.parametrize("objective", ["sft", "triage", "memft_window", "memft_curriculum"])
def test_a_resumed_run_ends_in_the_same_bytes(
    llama, phone_book, tmp_path, uninterrupted, objective, after, how
):
    settings = SETTINGS | OBJECTIVES[objective]
    out = tmp_path / "out"
    _stopped(phone_book, out, llama, settings, after=after, how=how)
    assert [p.name for p in out.iterdir() if p.name != ".lock"] == ["checkpoint.safetensors"]
    _write(phone_book, out, llama, resume=True, **settings)
    assert _adapter(out) == uninterrupted(objective)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "how"),
    [(30, "killed"), (48, "killed"), (48, "exception"), (30, "exception")],
)
def test_a_run_resumed_before_or_after_its_rank_grew_ends_in_the_same_bytes(
    llama, phone_book, tmp_path, uninterrupted, after, how
):
    settings = SETTINGS | OBJECTIVES["a rank that grows"]
    out = tmp_path / "out"
    _stopped(phone_book, out, llama, settings, after=after, how=how)
    result = _write(phone_book, out, llama, resume=True, **settings)
    assert result.rank == 32
    assert _adapter(out) == uninterrupted("a rank that grows")


@pytest.mark.slow
def test_a_run_stopped_again_and_again_ends_in_the_same_bytes(
    llama, phone_book, tmp_path, uninterrupted
):
    out = tmp_path / "out"
    for after in (2, 3, 6, 10):
        settings = SETTINGS | {"resume": after > 2}
        _stopped(phone_book, out, llama, settings, after=after, how="exception")
    result = _write(phone_book, out, llama, resume=True, **SETTINGS)
    assert result.epochs == EPOCHS
    assert _adapter(out) == uninterrupted("triage")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "exception"])
def test_the_training_curve_of_a_resumed_run_has_every_epoch_once(llama, phone_book, tmp_path, how):
    out = tmp_path / "out"
    _stopped(phone_book, out, llama, SETTINGS, after=5, how=how)
    _write(phone_book, out, llama, resume=True, **SETTINGS)
    curve = json.loads((out / "run.json").read_text())["curve"]
    assert [e["epoch"] for e in curve] == list(range(1, EPOCHS + 1))


def test_a_run_stopped_in_its_first_epoch_leaves_nothing(llama, phone_book, tmp_path):
    out = tmp_path / "out"
    _stopped(phone_book, out, llama, SETTINGS, after=1, how="exception")
    assert not out.exists()


@pytest.mark.slow
def test_resume_without_anything_to_resume_begins(llama, phone_book, tmp_path, uninterrupted):
    _write(phone_book, tmp_path / "out", llama, resume=True, **SETTINGS)
    assert _adapter(tmp_path / "out") == uninterrupted("triage")


@pytest.mark.slow
def test_more_epochs_after_giving_up_equal_one_longer_run(
    llama, phone_book, tmp_path, uninterrupted
):
    out = tmp_path / "out"
    settings = SETTINGS | {"objective": "sft"}  # triage goes by max_epochs
    first = _write(phone_book, out, llama, **settings | {"max_epochs": 5})
    assert not first.certified
    assert first.stopped_because == "max_epochs (5) reached"
    assert (out / "checkpoint.safetensors").is_file()
    second = _write(phone_book, out, llama, resume=True, **settings)
    assert (first.epochs, second.epochs) == (5, EPOCHS)
    assert _adapter(out) == uninterrupted("sft")


@pytest.mark.slow
def test_going_on_to_the_certificate_removes_the_checkpoint(llama, phone_book, tmp_path):
    out = tmp_path / "out"
    _write(phone_book, out, llama, max_epochs=5, retention=0)
    result = _write(phone_book, out, llama, resume=True, max_epochs=300, retention=0)
    assert result.certified
    assert not (out / "checkpoint.safetensors").exists()
    assert memlaw.check_certificate(out / "certificate.json", phone_book).holds


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 2e-3}, "learning_rate"),
        ({"seed": 1}, "seed"),
        ({"rank": 5}, "rank"),
        ({"layers": 1}, "layers"),
        ({"threshold": 0.6}, "threshold"),
        ({"seed": 1, "batch_size": 2}, "batch_size, another seed"),
        ({"prompt_format": "plain"}, "prompt_format"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(
    llama, phone_book, tmp_path, change, named
):
    out = tmp_path / "out"
    _stopped(phone_book, out, llama, SETTINGS, after=3, how="exception")
    before = (out / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=f"begun with another {named}\\."):
        _write(phone_book, out, llama, resume=True, **SETTINGS | change)
    assert [p.name for p in out.iterdir() if p.name != ".lock"] == ["checkpoint.safetensors"]
    assert (out / "checkpoint.safetensors").read_bytes() == before


def test_resuming_with_other_records_or_another_model_is_refused(
    llama, make_model, phone_book, tmp_path
):
    out = tmp_path / "out"
    _stopped(phone_book, out, llama, SETTINGS, after=3, how="exception")
    changed = [*phone_book[:-1], (phone_book[-1][0], "000000")]
    for book in (changed, phone_book[:-1], [*phone_book, ("Bo:", "1")]):
        with pytest.raises(ConfigError, match=r"another records\."):
            _write(book, out, llama, resume=True, **SETTINGS)
    with pytest.raises(ConfigError, match="another base model"):
        _write(phone_book, out, make_model("llama", seed=1), resume=True, **SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"audit_batch_size": 3}, {"max_epochs": EPOCHS + 1}])
def test_settings_that_decide_nothing_may_change(llama, phone_book, tmp_path, change):
    out = tmp_path / "out"
    _stopped(phone_book, out, llama, SETTINGS, after=3, how="exception")
    settings = SETTINGS | change
    assert _write(phone_book, out, llama, resume=True, **settings).epochs == settings["max_epochs"]


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_run_is_neither_resumed_nor_overwritten(
    llama, phone_file, tmp_path, capsys, resume
):
    out = tmp_path / "out"
    args = ["write", str(phone_file), "-o", str(out), "--model", str(llama), "--no-specificity"]
    assert cli.run(args) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert cli.run([*args, "--resume"] if resume else args) == 2
    said = capsys.readouterr().err
    assert "a finished run" in said
    assert ("nothing to go on with" in said) == resume
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_an_unfinished_run_is_not_overwritten_without_resume(llama, phone_book, tmp_path):
    out = tmp_path / "out"
    _stopped(phone_book, out, llama, SETTINGS, after=3, how="exception")
    before = (out / "checkpoint.safetensors").read_bytes()
    with pytest.raises(OutputError, match="--resume"):
        _write(phone_book, out, llama, **SETTINGS)
    assert (out / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "noise", "another format"])
def test_a_damaged_checkpoint_is_refused(llama, phone_book, tmp_path, damage):
    out = tmp_path / "out"
    _stopped(phone_book, out, llama, SETTINGS, after=3, how="exception")
    path = out / "checkpoint.safetensors"
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[: len(whole) // 2], "noise": b"\xff" * 100, "another format": b"{}"}[damage]
    )
    with pytest.raises(OutputError, match=r"damaged.*Remove it"):
        _write(phone_book, out, llama, resume=True, **SETTINGS)


@pytest.mark.slow
def test_what_a_killed_run_was_writing_is_cleared_away(llama, phone_book, tmp_path):
    out = tmp_path / "out"
    _stopped(phone_book, out, llama, SETTINGS, after=3, how="exception")
    (out / ".checkpoint.safetensors.x1y2z3").write_bytes(b"half")
    _write(phone_book, out, llama, resume=True, **SETTINGS)
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == [".gitignore"]


# ---------------------------------------------------------------- signals, from outside

_CHILD = """
import os, sys
import memlaw.writer.run
from memlaw.cli.dispatch import main
from memlaw.cli.progress import ConsoleObserver
memlaw.writer.run._CHECKPOINT_EVERY_S = 0.0
usual = ConsoleObserver.epoch
def epoch(self, stats, *rest):
    print("epoch", stats.epoch, flush=True)
    usual(self, stats, *rest)
ConsoleObserver.epoch = epoch
main()
"""


def _signalled(args, number, *, epoch):
    """Run the command in a process, send it a signal at an epoch; returns status and stderr."""
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        timer = threading.Timer(120, process.kill)
        timer.start()
        for line in process.stdout:
            if line.split() == ["epoch", str(epoch)]:
                process.send_signal(number)
                break
        _, said = process.communicate()
        timer.cancel()
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "epoch", "status"),
    [("SIGINT", 4, 130), ("SIGTERM", 9, 130), ("SIGKILL", 6, -9), ("SIGKILL", 23, -9)],
)
def test_a_signal_leaves_a_checkpoint_to_go_on_from(
    llama, phone_file, phone_book, tmp_path, name, epoch, status
):
    out = tmp_path / "out"
    # what triage does depends on max_epochs
    settings = {"objective": "sft", "rank": 4, "learning_rate": 1e-3, "max_epochs": 100_000}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    args = ["write", str(phone_file), "-o", str(out), "--model", str(llama), "--no-specificity"]
    args += flags
    code, said = _signalled(args, getattr(signal, name), epoch=epoch)
    assert code == status
    whole = [p.name for p in out.iterdir() if not p.name.startswith(".")]
    assert whole == ["checkpoint.safetensors"]
    load_file(out / "checkpoint.safetensors")
    if status == 130:
        assert "--resume" in said
        assert "Traceback" not in said
        assert [p.name for p in out.iterdir()] == whole
    curve_end = epoch + 60
    settings["max_epochs"] = curve_end
    resumed = _write(phone_file, out, llama, resume=True, **settings)
    once = _write(phone_file, tmp_path / "once", llama, **settings)
    assert resumed.epochs == once.epochs
    assert _adapter(out) == _adapter(tmp_path / "once")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_before_the_first_epoch_leaves_no_folder(llama, phone_file, tmp_path, name):
    out = tmp_path / "out"
    args = ["write", str(phone_file), "-o", str(out), "--model", str(llama)]
    script = f"""
import os, signal
import memlaw.writer.run
from memlaw.cli.dispatch import main
usual = memlaw.writer.run.load_model
def load(*args, **settings):
    os.kill(os.getpid(), signal.{name})
    return usual(*args, **settings)
memlaw.writer.run.load_model = load
main()
"""
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert "Interrupted before there was anything to keep." in done.stderr
    assert not out.exists()


def test_what_was_trained_is_kept_when_it_cannot_be_measured(
    llama, phone_book, tmp_path, monkeypatch
):
    settings = {"model": str(llama), "max_epochs": 300, "retention": 0, "specificity": False}

    def fail(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("memlaw.writer.goals.audit_as_saved", fail)
        with pytest.raises(OSError, match="no space left"):
            memlaw.write(phone_book, tmp_path / "out", **settings)
    result = memlaw.write(phone_book, tmp_path / "out", resume=True, **settings)
    assert result.certified
