"""What the terminal shows of an audit: where recall breaks, in 80 columns."""

import numpy as np
import pytest

import memlaw
from memlaw.console import _bars, show_audit


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
    assert _bars(np.array([0, 1, 10_000])) == "·▁█"
    assert _bars(np.zeros(3, int)) == "···"
