"""The solver by itself: how far it steps, and that its state is all that its steps depend on."""

import pytest
import torch

from memlaw.model.adapter import Adapter
from memlaw.model.sites import Site
from memlaw.settings.train import TrainConfig
from memlaw.train.solver import Solver

SITE = Site(module="x", d_in=4, d_out=3, layer=0, is_linear=True, is_transposed=False)
RATE = 0.01


def _solver(*, amsgrad=True):
    config = TrainConfig(learning_rate=RATE, retention=0)
    return Solver(Adapter([SITE], rank=1, seed=0), config, amsgrad=amsgrad)


def _step(solver, gradient):
    """How far a step moves B, from gradients that are all the same."""
    before = solver.adapter.b[0].detach().clone()
    for parameter in solver.adapter.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    solver.step(1.0)
    return float((solver.adapter.b[0].detach() - before).abs().max())


@pytest.mark.parametrize(("amsgrad", "share"), [(True, 0.001), (False, 1.0)])
def test_with_amsgrad_steps_shrink_with_the_gradients(amsgrad, share):
    solver = _solver(amsgrad=amsgrad)
    for _ in range(300):
        assert _step(solver, 1.0) == pytest.approx(RATE, rel=1e-3)
    last = [_step(solver, 0.001) for _ in range(2500)][-1]
    assert last == pytest.approx(RATE * share, rel=0.1)


@pytest.mark.parametrize("amsgrad", [True, False])
def test_a_restored_solver_steps_as_it_would_have(amsgrad):
    solver = _solver(amsgrad=amsgrad)
    for gradient in (1.0, 0.5, 0.001):
        _step(solver, gradient)
    other = _solver(amsgrad=amsgrad)
    other.adapter.load_state_dict(solver.adapter.state_dict())
    other.restore({key: value.clone() for key, value in solver.state().items()})
    for gradient in (0.002, 0.0, 0.3):
        assert _step(other, gradient) == _step(solver, gradient)


def test_a_state_without_highest_moments_goes_on_without():
    solver, other = _solver(), _solver(amsgrad=False)
    for gradient in (1.0, 0.001):
        _step(other, gradient)
    solver.adapter.load_state_dict(other.adapter.state_dict())
    solver.restore({key: value.clone() for key, value in other.state().items()})
    for gradient in (0.001, 0.002, 0.0):
        assert _step(solver, gradient) == _step(other, gradient)
    assert set(solver.state()) == set(other.state())


def test_what_another_training_starts_with_has_no_highest_moments():
    solver, plain = _solver(), _solver(amsgrad=False)
    for one in (solver, plain):
        _step(one, 1.0)
    assert set(solver.memory()) == set(plain.state()) < set(solver.state())


def test_what_is_new_of_a_grown_adapter_has_no_highest_moments():
    config = TrainConfig(learning_rate=RATE, retention=0)
    solver = _solver()
    for gradient in (1.0, 0.001):
        _step(solver, gradient)
    grown = Solver(solver.adapter.grown(2), config, amsgrad=True)
    grown.restore(solver.state())
    name = next(key for key in grown.state() if key.startswith("max_"))
    before, after = solver.state()[name], grown.state()[name]
    assert after.shape[1] == 2 * before.shape[1]
    assert torch.equal(after[:, : before.shape[1]], before)
    assert not after[:, before.shape[1] :].any()
