"""A learner by itself: its learning rate, its batches, its place among others' examples."""

import pytest
import torch

from memlaw.adapters import Adapter, Site
from memlaw.learner import Learner, TrainConfig
from memlaw.records import Example, Record

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
