"""Operations that a step is counted with."""

import pytest
import torch
import torch.nn.functional as F

from memlaw.train.trainer import _counter


@pytest.mark.parametrize("key_heads", [4, 1])
def test_on_a_gpu_attention_counts_as_its_matrix_products(key_heads):
    """Whatever kernel would run it: Q Kᵀ and P V of each head, for grouped keys as well."""
    query = torch.randn(3, 4, 10, 8)
    key, value = torch.randn(2, 3, key_heads, 10, 8)
    with _counter(True, torch.device("cuda")) as counter:
        F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert counter.get_total_flops() == 2 * (2 * 3 * 4 * 10 * 10 * 8)


def test_what_is_not_wanted_is_not_counted():
    with _counter(False, torch.device("cuda")) as counter:
        assert counter is None
