"""Annotations are checked while the tests run: shapes, and all else."""

import jaxtyping
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

from memlaw.model.head import head_losses
from memlaw.model.sites import layers_at


def _losses(n_targets):
    targets, dense = torch.zeros(n_targets, dtype=torch.int64), torch.ones(2, dtype=torch.bool)
    return head_losses(lambda x: x, torch.randn(2, 4), targets, dense=dense, max_rows=8)


def test_a_shape_that_does_not_fit_the_others_is_noticed():
    assert len(_losses(2).nll) == 2
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'targets'"):
        _losses(3)


def test_a_type_that_does_not_fit_is_noticed():
    assert layers_at(30, (0.5,)) == layers_at(30, (1, 0.5))[:1] == (15,)
    with pytest.raises(BeartypeCallHintViolation):
        layers_at(30, ("half",))
