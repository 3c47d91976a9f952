"""What training saw of each token, epoch by epoch: kept small, and the same when interrupted."""

import numpy as np
import pytest

import memlaw
from memlaw.core.errors import DataError
from memlaw.train.snapshots import SNAPSHOTS_FILE, Snapshots, read_snapshots


def _p(epoch, n=3):
    return np.full(n, 1 / epoch)


def _kept(epochs, n=3):
    kept = Snapshots(n)
    for epoch in epochs:
        kept.add(epoch, _p(epoch, n))
    return kept


def test_all_are_kept_while_they_are_few():
    kept = _kept(range(1, 201))
    assert kept.epochs == list(range(1, 201))
    assert np.allclose(kept.p[9], 0.1, atol=1e-3)


@pytest.mark.parametrize("n_epochs", [201, 399, 400, 1000, 1601])
def test_never_more_than_two_hundred_evenly_spread(n_epochs):
    kept = _kept(range(1, n_epochs + 1))
    assert 100 <= len(kept.epochs) <= 200
    assert len(set(np.diff(kept.epochs))) == 1
    assert n_epochs - kept.epochs[-1] < np.diff(kept.epochs)[0]


def test_fewer_where_there_are_many_tokens():
    n = 1_000_000
    kept = Snapshots(n)
    for epoch in range(1, 10):
        kept.add(epoch, np.zeros(n, np.float16))
    assert len(kept.epochs) <= 4


@pytest.mark.parametrize("stop", [1, 199, 200, 201, 350])
def test_an_interruption_changes_nothing(stop, tmp_path):
    """Also where the interrupted epoch was seen already, and made the others thinner."""
    straight = _kept(range(1, 421))
    kept = _kept(range(1, stop + 1)).until(stop - 1)
    kept = Snapshots.from_arrays(**kept.arrays())
    for epoch in range(stop, 421):
        kept.add(epoch, _p(epoch))
    assert kept.epochs == straight.epochs
    assert np.array_equal(np.stack(kept.p), np.stack(straight.p))


def test_what_is_kept_is_a_copy():
    kept, p = Snapshots(2), np.ones(2, np.float16)
    kept.add(1, p)
    p[:] = 0
    assert kept.p[0].tolist() == [1, 1]


def test_they_come_back_from_a_file_that_needs_no_pickle(tmp_path):
    path = tmp_path / SNAPSHOTS_FILE
    kept = _kept(range(1, 6))
    kept.write(path)
    with np.load(path, allow_pickle=False) as file:
        assert file["p"].dtype == np.float16
        assert sorted(file.files) == ["epochs", "p"]
    assert read_snapshots(path).epochs == kept.epochs
    assert Snapshots.from_arrays(**Snapshots(4).arrays()).epochs == []


def test_a_damaged_file_is_refused_by_name(tmp_path):
    path = tmp_path / SNAPSHOTS_FILE
    path.write_bytes(b"PK but no zip")
    with pytest.raises(DataError, match=r"snapshots\.npz can't be read"):
        read_snapshots(path)


@pytest.mark.slow
def test_a_write_keeps_what_its_epochs_saw_also_when_resumed(llama, phone_book, tmp_path):
    settings = {
        "model": str(llama),
        "objective": "sft",  # what triage does depends on max_epochs
        "rank": 8,
        "retention": 0.0,
        "threshold": 0.9,
        "margin": 0.09,
        "dtype": "float32",
        "specificity": False,
    }
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    memlaw.write(phone_book, straight, max_epochs=6, **settings)
    memlaw.write(phone_book, halves, max_epochs=3, **settings)
    assert read_snapshots(halves / SNAPSHOTS_FILE).epochs == [1, 2, 3]
    memlaw.write(phone_book, halves, max_epochs=6, resume=True, **settings)
    kept, resumed = (read_snapshots(f / SNAPSHOTS_FILE) for f in (straight, halves))
    assert kept.epochs == resumed.epochs == [1, 2, 3, 4, 5, 6]
    assert np.array_equal(np.stack(kept.p), np.stack(resumed.p))
    assert ((np.stack(kept.p) > 0) & (np.stack(kept.p) <= 1)).all()


@pytest.mark.slow
def test_each_token_stands_at_its_place_in_the_table(llama, phone_book, tmp_path):
    """With no step taken yet, what the first epoch saw is what an audit of the base finds."""
    memlaw.write(
        phone_book,
        tmp_path / "out",
        model=str(llama),
        rank=2,
        max_epochs=1,
        batch_size=4,
        dtype="float32",
        specificity=False,
    )
    seen = read_snapshots(tmp_path / "out" / SNAPSHOTS_FILE).p[0].astype(np.float32)
    base = memlaw.audit(phone_book, model=str(llama), dtype="float32", decode="none")
    assert np.allclose(seen, base.tokens.p, atol=1e-3)
