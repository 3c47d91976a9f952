"""KL(base ‖ adapted) and its gradient, piece by piece."""

import pytest
import torch

from memlaw.model.divergence import divergence

WIDTH, VOCABULARY, ROWS = 8, 50, 37


@pytest.fixture(scope="module")
def states():
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(WIDTH, VOCABULARY, generator=generator)
    hidden, base = (torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2))
    return head, hidden, base


@pytest.mark.parametrize("max_rows", [1, 5, ROWS, 1000])
def test_it_is_what_autograd_says(states, max_rows):
    head, hidden, base = states
    leaf = hidden.clone().requires_grad_()
    log_p, log_q = ((h @ head).log_softmax(1) for h in (base, leaf))
    expected = (log_p.exp() * (log_p - log_q)).sum(1)
    expected.sum().backward()
    kl, at_hidden = divergence(lambda h: h @ head, hidden, base, max_rows=max_rows)
    assert torch.allclose(kl, expected.detach(), rtol=1e-5)
    assert torch.allclose(at_hidden, leaf.grad, rtol=1e-4, atol=1e-6)
    assert float(kl.min()) > 0.1


def test_of_the_same_states_it_is_nothing(states):
    head, hidden, _ = states
    kl, at_hidden = divergence(lambda h: h @ head, hidden, hidden, max_rows=10)
    assert float(kl.abs().max()) == 0
    assert float(at_hidden.abs().max()) == 0


def test_of_no_positions_it_is_empty(states):
    head, hidden, base = states
    kl, at_hidden = divergence(lambda h: h @ head, hidden[:0], base[:0], max_rows=10)
    assert kl.shape == (0,)
    assert at_hidden.shape == (0, WIDTH)
