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
    monkeypatch.setattr(threads, "_FOLLOWER", threads._FollowLoad())
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
    return SimpleNamespace(get_input_embeddings=lambda: words, run=lambda: words(torch.tensor([0])))


def test_threads_are_given_up_at_once_and_taken_again_after_a_while(taken, clock):
    model = _model()
    threads.follow_load(model)
    for free, expected in ((4.0, 4), (2.8, 3), (1.5, 1), (0.2, 1)):
        clock(3.0, free)
        model.run()
        assert taken[-1] == expected
    for looks in range(1, 2 * threads._SURE):
        clock(3.0, 2.71)
        model.run()
        assert taken[-1] == (3 if looks >= threads._SURE else 1)
    for free in (9.0, 9.0, 3.0, 9.0, 9.0, 9.0, 9.0):  # five in a row: one in between was others'
        clock(3.0, free)
        model.run()
    assert taken[-1] == 3
    clock(3.0, 9.0)
    model.run()
    assert taken[-1] == 4


def test_it_looks_now_and_then(taken, clock, monkeypatch):
    monkeypatch.setattr(threads, "_SURE", 1)
    model = _model()
    threads.follow_load(model)
    n = len(taken)
    for free in (1.0, 3.0):
        for _ in range(5):
            clock(0.5, free)
            model.run()
    assert taken[n:] == [1, 2]


def test_a_model_that_is_loaded_under_load_isnt_left_with_what_there_was_then(taken, clock):
    first, second = _model(), _model()
    threads.follow_load(first)
    clock(3.0, 1.0)
    first.run()
    assert taken[-1] == 1
    threads.follow_load(second)
    assert threads.most_threads() == 4
    for _ in range(threads._SURE):
        clock(3.0, 4.0)
        second.run()
    assert taken[-1] == 4


def test_what_pytorch_is_told_meanwhile_is_the_most_for_the_next_model(taken, clock):
    threads.follow_load(_model())
    taken.append(2)
    model = _model()
    threads.follow_load(model)
    for _ in range(2 * threads._SURE):
        clock(3.0, 4.0)
        model.run()
    assert taken[-1] == 2


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
    model.run()
    assert taken == [4]


def test_one_thread_is_left_alone(taken, clock):
    taken[:] = [1]
    model = _model()
    threads.follow_load(model)
    clock(3.0, 4.0)
    model.run()
    assert taken[-1] == 1


@pytest.mark.parametrize(
    ("files", "member", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, None, 1.5),
        ({"cpu.max": "max 100000\n"}, "0::/", math.inf),
        ({"a/b/cpu.max": "300000 100000\n", "a/cpu.max": "200000 100000"}, "0::/a/b\n", 2.0),
        ({"a/b/cpu.max": "300000 100000\n", "a/cpu.max": "max 100000"}, "0::/a/b\n", 3.0),
        ({"cpu.max": "100000 100000\n"}, "0::/not/seen/here", 1.0),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, None, 4.0),
        (
            {"cpu/x/cpu.cfs_quota_us": "50000\n", "cpu/x/cpu.cfs_period_us": "100000\n"},
            "3:memory:/y\n2:cpu,cpuacct:/x\n",
            0.5,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "1000\n"}, None, math.inf),
        ({"cpu/cpu.cfs_quota_us": "5\n"}, None, math.inf),
        ({"cpu.max": "5 0"}, None, math.inf),
        ({"cpu.max": "what?"}, None, math.inf),
        ({"cpu.max": "100000 100000"}, "what?\n\n", 1.0),
        ({}, None, math.inf),
    ],
)
def test_a_cgroups_quota_is_read(tmp_path, files, member, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    membership = tmp_path / "membership"
    if member is not None:
        membership.write_text(member)
    assert threads.quota(tmp_path, membership) == cores


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


def test_a_system_that_doesnt_tell_counts_as_free(monkeypatch):
    def silent(percpu):
        raise PermissionError

    monkeypatch.setattr(threads.psutil, "cpu_times", silent)
    (at, unused), (later, more) = threads._now(), threads._now()
    assert more - unused == pytest.approx(os.cpu_count() * (later - at))
