"""A learner by itself: its learning rate, its batches, its place among others' examples."""

import pytest
import torch

from memlaw.data.record import Example, Record
from memlaw.model.adapter import Adapter
from memlaw.model.sites import Site
from memlaw.settings.train import TrainConfig
from memlaw.train.learner import Learner

SITE = Site(module="x", d_in=4, d_out=3, layer=0, is_linear=True, is_transposed=False)
EXAMPLES = [
    Example(
        record=Record(prompt="?", completion="!", id=str(n)), prompt_ids=(1,), target_ids=(2, 3)
    )
    for n in range(7)
]


def _learner(rows=None, **settings):
    return Learner(
        Adapter([SITE], rank=1, seed=0), EXAMPLES, TrainConfig(retention=0, **settings), rows=rows
    )


def _stepped(learner):
    """How far a step has moved B, from a gradient that is the same every time."""
    before = learner.adapter.b[0].detach().clone()
    for parameter in learner.adapter.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    learner.step()
    return float((learner.adapter.b[0].detach() - before).abs().max())


@pytest.mark.parametrize(
    ("nll_nats", "share"), [(9.0, 1.0), (1.0, 1.0), (0.25, 0.5), (0.04, 0.2), (0.0001, 0.1)]
)
def test_the_rate_is_the_root_of_the_loss_within_limits(nll_nats, share):
    learner = _learner(learning_rate=0.01)
    assert _stepped(learner) == pytest.approx(0.01, rel=1e-3)
    learner.end_epoch(nll_nats)
    assert _stepped(learner) == pytest.approx(0.01 * share, rel=1e-3)
    assert learner.epoch == 1
    assert learner.n_steps == 2


@pytest.mark.parametrize(
    ("settings", "holds", "amsgrad"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"schedule": "constant"}, False, False),
        ({"schedule": "linear", "total_steps": 5}, False, False),
    ],
)
def test_second_moments_never_fall_where_the_rate_follows_the_loss(settings, holds, amsgrad):
    learner = _learner(**settings)
    learner.holding = object() if holds else None
    assert learner.new_solver().amsgrad is amsgrad


def test_second_moments_fall_in_a_training_that_starts_from_another():
    earlier, learner = _learner(learning_rate=0.01), _learner(learning_rate=0.01)
    _stepped(earlier)
    learner.start_from(
        [(earlier.adapter.a[0].detach(), earlier.adapter.b[0].detach())], earlier.solver.state()
    )
    assert earlier.solver.amsgrad
    assert not learner.solver.amsgrad
    assert not learner.new_solver().amsgrad
    found, memory = learner.solver.state(), earlier.solver.memory()
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in memory.items()}


def test_a_constant_rate_stays():
    learner = _learner(learning_rate=0.01, schedule="constant")
    learner.end_epoch(0.01)
    assert _stepped(learner) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("batch_size", "sizes"), [(3, {2, 3}), (7, {7}), (100, {7}), (1, {1})])
def test_an_epoch_holds_every_record_once_in_even_batches(batch_size, sizes):
    learner = _learner(batch_size=batch_size)
    batches = learner.batches()
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    assert {len(batch) for batch in batches} == sizes
    assert learner.batches() == batches
    learner.end_epoch(1.0)
    assert batch_size in (7, 100) or learner.batches() != batches


def test_a_learner_of_some_rows_never_sees_the_others():
    learner = _learner(rows=[1, 4, 6], batch_size=2)
    assert sorted(row for batch in learner.batches() for row in batch) == [1, 4, 6]


def _on_triage(**settings):
    """A learner of seven records of two tokens, after an epoch that knew none of them."""
    learner = _learner(objective="triage", batch_size=2, **settings)
    learner.seen.note(range(7), torch.full((14,), 5.0))
    learner.end_epoch(5.0)
    return learner


def test_triage_trains_what_is_on_course():
    learner = _on_triage(schedule="linear", total_steps=10)
    assert sorted(row for batch in learner.batches() for row in batch) == list(range(7))
    learner.seen.note([2, 5], torch.zeros(4))  # known: 4 of 14 tokens
    learner.n_looks = 7  # of 10 steps: 2/7 of all tokens, so 4/7 are on course, 8.2 of 14
    learner.end_epoch(5.0)
    assert sorted(row for batch in learner.batches() for row in batch) == [0, 1, 2, 3, 5]
    assert learner.admitted().tolist() == [2, 2, 2, 1, 0, 2, 0]
    weights = learner.weigh([0, 2], torch.tensor([9.0, 9.0, 0.0, 0.0]), torch.ones(4).bool())
    assert (weights > 0).all()
    assert weights[0] > 3 * weights[2]


def test_triage_goes_by_epochs_where_no_steps_are_set():
    learner = Learner(
        Adapter([SITE], rank=1, seed=0),
        EXAMPLES,
        TrainConfig(retention=0, objective="triage"),
        max_epochs=10,
    )
    for _ in range(9):
        learner.seen.note(range(7), torch.full((14,), 5.0))
        learner.seen.note([3], torch.zeros(2))
        learner.end_epoch(5.0)
    assert learner.progress == 0.9
    assert learner.batches() == [[3]]  # known before, and nothing learnt since


def test_without_an_end_in_sight_triage_gives_nothing_up():
    learner = _on_triage()
    for _ in range(50):
        learner.end_epoch(5.0)
    assert learner.progress == 0
    assert sorted(row for batch in learner.batches() for row in batch) == list(range(7))


def test_what_an_epoch_leaves_out_is_still_counted():
    learner = _on_triage(schedule="linear", total_steps=10)
    learner.seen.note([2], torch.zeros(2))
    assert learner.seen.n_under(range(7)) == 12
    assert learner.seen.n_under([2, 3]) == 2
    assert learner.seen.share_over() == pytest.approx(2 / 14)
    assert learner.seen.share_under() == pytest.approx(6 / 7)
    learner.train_on([2, 3])
    assert learner.seen.share_under() == 0.5


def test_what_triage_admits_survives_a_restart():
    learner = _on_triage(schedule="linear", total_steps=10)
    learner.seen.note([2], torch.zeros(2))
    learner.n_looks = 6
    learner.end_epoch(5.0)
    again = _learner(objective="triage", batch_size=2, schedule="linear", total_steps=10)
    again.restore(*learner.state())
    assert again.batches() == learner.batches() != [list(range(7))]
    assert again.seen.over_at_start == learner.seen.over_at_start == 0.0
