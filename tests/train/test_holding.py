"""Negatives of a step, the mean of the weights, and how tightly the model is held."""

import dataclasses

import pytest
import torch

from memlaw.model.adapter import Adapter
from memlaw.model.sites import Site
from memlaw.settings.recipe import RECIPE
from memlaw.train.holding import Holding
from memlaw.train.retention import Term

SITE = Site(module="x", d_in=4, d_out=3, layer=0, is_linear=True, is_transposed=False)
SMALL = dataclasses.replace(RECIPE, near_per_step=3, chats_per_step=2, mean=0.5)
NEAR, CHATS = range(10, 20), range(20, 24)


def _holding(recipe=SMALL, near=NEAR, chats=CHATS, active=True, n_records=10):
    generator = torch.Generator().manual_seed(0)
    term = Term(
        sites=[0],
        reads=[torch.randn(6, 4, generator=generator)],
        writes=[torch.randn(6, 3, generator=generator)],
    )
    lengths = [1] * len(near) + [5] * len(chats)
    rows = {"near": near, "chats": chats, "lengths": lengths, "n_records": n_records}
    held = Holding(recipe, **rows, closed=term, seed=0)
    held.active = active
    return held


def _adapter(value=0.0):
    adapter = Adapter([SITE], rank=1, seed=0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.fill_(value)
    return adapter


def _weights(adapter):
    return float(adapter.a[0][0, 0])


def test_negatives_join_when_the_loss_is_low_and_stay():
    holding = _holding(active=False)
    assert holding.draw(0) == []
    assert float(holding.penalty(_adapter(1.0), 0).detach()) == 0
    holding.after_epoch(1.7)
    assert holding.draw(0) == []
    holding.after_epoch(1.5)
    holding.after_epoch(9.0)
    assert len(holding.draw(0)) == 5
    assert float(holding.penalty(_adapter(1.0), 0).detach()) > 0


def test_a_step_draws_of_each_kind_and_the_same_ones_again():
    holding = _holding()
    drawn = [holding.draw(step) for step in range(20)]
    assert drawn == [holding.draw(step) for step in range(20)]
    assert len({tuple(rows) for rows in drawn}) > 10
    for rows in drawn:
        assert len(set(rows)) == 5
        assert all(row in NEAR for row in rows[:3])
        assert all(row in CHATS for row in rows[3:])


def test_those_that_slip_are_drawn_more_often():
    holding = _holding()
    holding.last_kl[:] = 0.0
    holding.last_kl[4] = 2.0
    drawn = [row for step in range(50) for row in holding.draw(step) if row in NEAR]
    assert drawn.count(NEAR[4]) == 50
    assert 5 <= drawn.count(NEAR[0]) <= 25


@pytest.mark.parametrize(("near", "chats", "n"), [([], CHATS, 2), (NEAR, [], 3), (NEAR[:1], [], 1)])
def test_few_negatives_are_drawn_all(near, chats, n):
    assert len(_holding(near=near, chats=chats).draw(0)) == n


def test_kinds_have_their_weights_whatever_the_number_of_positions():
    holding = _holding()
    holding.push = 2.0
    kl = torch.arange(1.0, 14.0)
    weights = holding.weigh([10, 12, 14, 20, 23], kl)
    assert float(weights[:3].sum()) == pytest.approx(2 * SMALL.near)
    assert float(weights[3:].sum()) == pytest.approx(2 * SMALL.chat)
    assert holding.last_kl[[0, 2, 4, 10, 13]].tolist() == [1, 2, 3, 6, 11]
    assert float(holding.last_kl[1]) == 1  # not seen yet


def test_the_mean_begins_with_the_negatives_and_follows():
    holding, adapter = _holding(active=False), _adapter(1.0)
    holding.after_step(adapter, 5)
    assert holding.mean is None
    holding.active = True
    for value in (2.0, 4.0):
        with torch.no_grad():
            adapter.a[0].fill_(value)
        holding.after_step(adapter, 5)
    assert float(holding.mean[0][0, 0]) == 3.0


@pytest.mark.parametrize(
    ("warm", "n_batches", "mean"),
    [
        (False, 1, 3.0),
        (True, 1, 4 - 2 * 0.5**5),
        (True, 2, 4 - 2 * 0.5**2.5),
        (True, 5, 3.0),
        (True, 9, 3.0),
    ],
)
def test_in_an_update_the_mean_follows_as_quickly_in_epochs(warm, n_batches, mean):
    assert (SMALL.mean, SMALL.steps) == (0.5, 5)
    holding, adapter = _holding(), _adapter(2.0)
    if warm:
        holding.start_warm(adapter, None, 1.0)
    else:
        holding.begin_mean(adapter)
    with torch.no_grad():
        adapter.a[0].fill_(4.0)
    holding.after_step(adapter, n_batches)
    assert float(holding.mean[0][0, 0].detach()) == pytest.approx(mean)


def test_it_holds_tighter_while_all_pass_and_looser_when_too_many_dont():
    holding = _holding()
    holding.after_step(_adapter(1.0), 5)
    holding.after_look(6, 0.5, 0.5)
    assert (holding.push, holding.kept) == (1.0, None)
    for epoch in (9, 12):
        holding.after_look(epoch, 1.0, 1.0)
    assert holding.push == pytest.approx(SMALL.tighter**2)
    assert (holding.first_over, holding.last_epoch) == (9, 15)  # 9 · 1.6 = 14.4
    holding.after_look(15, 0.98, 0.98)
    assert holding.push == pytest.approx(SMALL.tighter**2)
    holding.after_look(18, 0.9, 0.9)
    assert holding.push == pytest.approx(SMALL.tighter**2 / SMALL.looser)
    for epoch in range(21, 60, 3):
        holding.after_look(epoch, 1.0, 1.0)
    assert holding.push == SMALL.most_push


def test_what_failed_its_audit_is_followed_by_looser_looks_until_all_pass_again():
    holding = _holding()
    holding.after_step(_adapter(1.0), 5)
    for epoch in (6, 9, 12):
        holding.after_look(epoch, 1.0, 1.0)
    holding.forget_kept()
    assert (holding.kept, holding.push) == (None, pytest.approx(SMALL.tighter**2))
    holding.after_look(15, 0.98, 0.98)
    assert holding.push == pytest.approx(SMALL.tighter**2 / SMALL.looser)
    holding.after_look(18, 1.0, 1.0)
    assert holding.kept is not None
    held = holding.push
    holding.after_look(21, 0.98, 0.98)
    assert holding.push == held


@pytest.mark.parametrize("n", [4, 100])
def test_what_a_few_records_failed_is_waited_for_before_the_hold_gives_way(n):
    holding = _holding(n_records=n)
    holding.after_step(_adapter(1.0), 5)
    for epoch in (6, 9, 12):
        holding.after_look(epoch, 1.0, 1.0)
    held = holding.kept_push
    assert held < holding.push
    assert holding.mend([3])
    assert (holding.kept, holding.push, float(holding.failed.sum())) == (None, held, 1.0)
    for epoch in (15, 18, 21):
        holding.after_look(epoch, 1 - 1 / n, 1.0)
        assert holding.push == held
    holding.after_look(24, 1 - 1 / n, 1.0)
    assert holding.push == pytest.approx(held / SMALL.looser)
    assert holding.mend([3])
    holding.after_look(27, 0.5, 1.0)  # far too many: no waiting
    assert holding.push == pytest.approx(held / SMALL.looser**2)
    assert not holding.mend([3])  # a third time: a matter of all
    assert not holding.mend([0, 1, 2, 3])
    assert not holding.mend([])


def test_nothing_is_waited_for_once_all_were_safe_again_or_many_failed():
    for happens in (lambda h: h.after_look(12, 1.0, 1.0), lambda h: h.forget_kept()):
        holding = _holding(n_records=100)
        holding.after_step(_adapter(1.0), 5)
        for epoch in (6, 9):
            holding.after_look(epoch, 1.0, 1.0)
        assert holding.mend([3])
        happens(holding)
        holding.forget_kept()
        holding.push = held = 6.0
        holding.after_look(15, 0.99, 1.0)
        assert holding.push == pytest.approx(held / SMALL.looser)


def test_what_was_kept_was_trained_under_a_hold_that_is_known():
    holding = _holding()
    holding.after_step(_adapter(1.0), 5)
    for epoch in (6, 9):
        holding.after_look(epoch, 1.0, 1.0)
    assert holding.kept_push == SMALL.tighter < holding.push
    holding.forget_kept()
    assert holding.kept_push is None


def test_an_update_begins_with_the_hold_of_the_generation_before_and_ends_sooner():
    holding = _holding()
    holding.start_warm(_adapter(2.0), 3, SMALL.tighter)
    assert (holding.active, holding.gate, holding.push) == (True, 3, SMALL.tighter)
    assert float(holding.mean[0][0, 0]) == 2.0
    holding.after_look(100, 1.0, 1.0)
    assert (holding.last_epoch, holding.late_epoch) == (110, 160)
    holding.first_over = 20
    assert holding.last_epoch == 20 + 2 * SMALL.look_epochs
    holding.start_warm(_adapter(2.0), None, 1e9)
    assert holding.push == SMALL.most_push
    holding.start_warm(_adapter(2.0), None, 0.25)
    assert (holding.push, holding.least_push) == (0.25, 0.25)


def test_where_no_hold_is_known_an_update_is_held_as_a_write_is():
    holding = _holding()
    holding.start_warm(_adapter(2.0), 3, None)
    assert (holding.gate, holding.push, holding.extra) == (3, 1.0, SMALL.extra)


def test_over_the_line_the_rate_falls_and_well_over_it_the_mean_is_kept():
    holding = _holding()
    holding.after_step(_adapter(1.0), 5)
    holding.after_look(6, 0.99, 0.99)
    assert (holding.rate, holding.first_over, holding.kept) == (1.0, 0, None)
    holding.after_look(9, 0.99, 1.0)
    assert (holding.rate, holding.first_over, holding.kept) == (SMALL.last_rate, 9, None)
    assert holding.push == 1.0
    holding.after_look(12, 1.0, 1.0)
    assert holding.kept is not None
    assert (holding.first_over, holding.last_kept) == (9, 12)
    assert holding.push == SMALL.tighter


def test_it_looks_every_few_epochs_once_most_records_are_there():
    holding = _holding()
    assert not holding.is_due(9, 0.0)  # there is no mean
    holding.after_step(_adapter(1.0), 5)
    assert holding.is_due(9, 0.19)
    assert not holding.is_due(9, 0.21)
    holding.after_look(9, 1.0, 1.0)
    assert [epoch for epoch in range(9, 14) if holding.is_due(epoch, 1.0)] == [12, 13]


def test_what_is_shown_is_not_what_is_trained():
    holding, adapter = _holding(), _adapter(1.0)
    holding.after_step(adapter, 5)
    with torch.no_grad():
        adapter.a[0].fill_(5.0)
    holding.show(adapter, holding.mean)
    assert _weights(adapter) == 1.0
    assert float(holding.in_training(adapter)["a.0"][0, 0]) == 5.0
    holding.show(adapter, [w + 1 for w in holding.mean])
    assert _weights(adapter) == 2.0
    holding.hide(adapter)
    assert _weights(adapter) == 5.0
    holding.hide(adapter)
    assert _weights(adapter) == 5.0


def test_tokens_near_the_line_weigh_more_from_look_to_look():
    holding = _holding()
    near, far = holding.recipe.stubborn
    odds = torch.tensor([near - 1, (near + far) / 2, far + 1])
    for expected in ([2, 1, 1], [4, 1, 1], [8, 1, 1]):
        holding.focus_on(odds)
        assert holding.focus.tolist() == expected
    holding.focus_on(odds.flip(0))  # the first is far over the line now, the last one near
    assert holding.focus.tolist() == [4, 1, 2]
    for _ in range(9):
        holding.focus_on(odds)
    assert holding.focus.tolist() == [holding.recipe.most_focus, 1, 1]


def test_its_state_comes_back():
    holding = _holding()
    holding.after_step(_adapter(1.0), 5)
    holding.after_look(9, 1.0, 1.0)
    holding.weigh([10], torch.tensor([7.0]))
    tensors, values = holding.state()
    again = _holding(active=False)
    again.restore({k: v.clone() for k, v in tensors.items()}, values)
    assert again.state()[1] == values
    assert all(torch.equal(again.state()[0][name], tensors[name]) for name in tensors)
    assert [again.draw(n) for n in range(9)] == [holding.draw(n) for n in range(9)]


def test_restored_weights_go_where_the_adapter_is():
    """A checkpoint's tensors are on the CPU; what draws from `last_kl` is there, too."""
    holding, adapter = _holding(), _adapter(1.0)
    holding.begin_mean(adapter)
    holding.kept = holding.mean
    tensors, values = holding.state()
    holding.restore(tensors, values, torch.device("meta"))
    assert {w.device.type for w in (*holding.mean, *holding.kept)} == {"meta"}
    assert holding.last_kl.device.type == "cpu"
