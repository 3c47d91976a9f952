"""As many threads as cores are free: what is idle counts, and what the process uses itself."""

import math
import os
from types import SimpleNamespace

import pytest
import torch

from memlaw.model import threads
from memlaw.model.base import load_model


@pytest.fixture
def taken(monkeypatch):
    """What PyTorch is told, instead of being told; it begins with four threads."""
    told = [4]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads.torch, "set_num_threads", told.append)
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: told[-1])
    monkeypatch.setattr(threads, "quota", lambda: math.inf)
    return told


@pytest.fixture
def clock(monkeypatch):
    """The time, and what of it was idle or the process's own."""
    now = SimpleNamespace(at=0.0, unused=0.0)
    monkeypatch.setattr(threads, "_now", lambda: (now.at, now.unused))
    monkeypatch.setattr(threads.time, "monotonic", lambda: now.at)

    def pass_s(seconds, free):
        now.at += seconds
        now.unused += seconds * free

    return pass_s


def _model():
    words = torch.nn.Embedding(2, 1)
    return SimpleNamespace(get_input_embeddings=lambda: words)


def test_threads_follow_what_others_leave(taken, clock):
    model = _model()
    threads.follow_load(model)
    run = model.get_input_embeddings()
    for free, expected in ((4.0, 4), (2.8, 3), (1.5, 1), (0.2, 1), (3.69, 3), (3.71, 4), (9.0, 4)):
        clock(3.0, free)
        run(torch.tensor([0]))
        assert taken[-1] == expected


def test_it_looks_now_and_then(taken, clock):
    model = _model()
    threads.follow_load(model)
    run, n = model.get_input_embeddings(), len(taken)
    for _ in range(10):
        clock(0.5, 1.0)
        run(torch.tensor([0]))
    assert taken[n:] == [1, 1]


@pytest.mark.parametrize(("most", "expected"), [(2.5, 2), (0.5, 1), (8.0, 4)])
def test_a_quota_bounds_them(taken, monkeypatch, most, expected):
    monkeypatch.setattr(threads, "quota", lambda: most)
    threads.follow_load(_model())
    assert taken[-1] == expected


def test_a_number_that_is_given_is_obeyed(taken, clock, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    model = _model()
    threads.follow_load(model)
    clock(3.0, 0.0)
    model.get_input_embeddings()(torch.tensor([0]))
    assert taken == [4]


def test_one_thread_is_left_alone(taken, clock):
    taken[:] = [1]
    model = _model()
    threads.follow_load(model)
    clock(3.0, 4.0)
    model.get_input_embeddings()(torch.tensor([0]))
    assert taken[-1] == 1


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "5\n"}, math.inf),
        ({"cpu.max": "5 0"}, math.inf),
        ({"cpu.max": "what?"}, math.inf),
        ({}, math.inf),
    ],
)
def test_a_cgroups_quota_is_read(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.quota(tmp_path) == cores


def test_what_is_idle_or_ours_is_no_more_than_there_is():
    at, unused = threads._now()
    while threads.time.monotonic() - at < 0.3:
        pass
    later, more = threads._now()
    used = later - at
    assert 0 < more - unused < 1.2 * os.cpu_count() * used + 0.1


def test_a_model_on_the_cpu_follows_the_load(llama, monkeypatch):
    followed = []
    monkeypatch.setattr("memlaw.model.base.follow_load", followed.append)
    base = load_model(llama)
    assert followed == [base.model]
