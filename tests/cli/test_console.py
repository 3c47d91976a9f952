"""What the terminal shows: where recall breaks, in 80 columns, and how a probe goes."""

import io

import numpy as np
import pytest
from rich.console import Console

import memlaw
from memlaw.cli.audit import show_audit
from memlaw.cli.progress import ConsoleObserver
from memlaw.cli.verdicts import bars
from memlaw.cli.write import time_taken
from memlaw.core.observer import EpochStats, Spec
from memlaw.settings.probe import ProbeConfig


@pytest.fixture(scope="module")
def base_audit(llama, phone_book):
    """Of a model that knows none of it."""
    return memlaw.audit(phone_book, model=str(llama), dtype="float32")


def test_where_recall_breaks_is_plotted(base_audit, capsys):
    show_audit(base_audit)
    lines = capsys.readouterr().out.splitlines()
    (p,) = (line for line in lines if line.startswith("p of the tokens"))
    (first,) = (line for line in lines if line.startswith("first failures at"))
    assert p.index("│") - p.index("0 ") - 2 == 11  # 0.55 of twenty columns
    assert "█" in p
    assert first.split("start ")[1][0] == "█"  # all of them break at once
    assert all(len(line) <= 80 for line in lines[: lines.index(first) + 1])


def test_bars_show_what_is_rare_and_what_is_nothing():
    assert bars(np.array([0, 1, 10_000])) == "·▁█"
    assert bars(np.zeros(3, int)) == "···"


def test_what_a_next_run_does_not_take_is_said_where_it_matters():
    assert time_taken(100, 0) == "1:40"
    assert time_taken(100, 5) == "1:40"
    assert time_taken(6, 4) == "6 s"
    assert time_taken(600, 29) == "10:00"
    assert time_taken(600, 31) == "10:00, 31 s of it once for this base model"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_probe_is_a_grid_on_a_terminal_and_lines_elsewhere(monkeypatch, is_terminal):
    seen = io.StringIO()
    monkeypatch.setattr(
        "memlaw.cli.progress.PlainConsole",
        lambda **_: Console(file=seen, force_terminal=is_terminal, width=100),
    )
    observer = ConsoleObserver()
    try:
        observer.grid(ProbeConfig(ranks=(1, 3), lengths=(6,)), [], 2)
        observer.steps([Spec(6, 1, 0)], 5, 12, 1.25)
        observer.cell(
            Spec(6, 1, 0), "success", {"delta_nll": 4.56, "saturated": False, "share_under": 0.5}
        )
        observer.steps([Spec(6, 3, 0)], 6, 12, 1.25)
    finally:
        observer.close()
    said = seen.getvalue()
    assert ("rank \\ length" in said) == is_terminal
    assert ("step 6/12" in said) == is_terminal  # elsewhere ten seconds would have to pass
    assert (
        "length 6, rank 1, seed 0: loss fell by 4.56, 50.0% of tokens under" in said
    ) != is_terminal
    assert "4.56" in said


def test_each_training_has_its_own_time_left(monkeypatch):
    """The second of two shards begins at epoch 1 again: the first one's time isn't its own."""
    lines, clock = [], iter(range(0, 10_000, 100))
    monkeypatch.setattr("memlaw.cli.progress.time.monotonic", lambda: float(next(clock)))
    observer = ConsoleObserver()
    monkeypatch.setattr(observer, "_show", lambda line, always=False: lines.append(line))
    for epoch in (1, 2, 1, 2):
        stats = EpochStats(
            epoch=epoch,
            nll_nats=1.0,
            n_under=3,
            n_records_over=0,
            n_relapses=0,
            n_left_out=0,
            n_steps=epoch,
            rank=2,
            retention=0.0,
            n_tokens_run=10,
            flop=1e9,
            wall_s=100.0,
        )
        observer.epoch(stats, n_records=2, max_epochs=10)
    observer.close()
    assert [line.split("GFLOP/s  ")[1] for line in lines[:2]] == [
        line.split("GFLOP/s  ")[1] for line in lines[2:]
    ]
