"""Annotations of shapes and dtypes are checked while these tests run."""

import pytest
import torch
from jaxtyping import TypeCheckError

from memlaw.measure.damage import measure_damage
from memlaw.model.adapter import lora_delta
from memlaw.model.forward import Batch, unflatten
from memlaw.model.head import head_losses, sampled_score

IDS = torch.zeros(2, 3, dtype=torch.long)
X = torch.zeros(3, 4)
WRONG = {
    "widths that differ": lambda: lora_delta(X, torch.zeros(5, 2), torch.zeros(2, 4)),
    "ranks that differ": lambda: lora_delta(X, torch.zeros(4, 2), torch.zeros(3, 4)),
    "factors in half precision": lambda: lora_delta(X, torch.zeros(4, 2).half(), torch.zeros(2, 4)),
    "draws for other rows": lambda: sampled_score(X, torch.zeros(1)),
    "targets for other rows": lambda: head_losses(
        lambda h: h, X, IDS[0, :2], dense=torch.ones(3, dtype=torch.bool), max_rows=1
    ),
    "a mask that is not boolean": lambda: unflatten(torch.ones(6), IDS),
    "a batch of two sizes": lambda: Batch(
        input_ids=IDS, attention_mask=IDS[:1], keep=IDS.bool(), target_ids=IDS[0]
    ),
    "one window without its dimension": lambda: measure_damage(
        None, lambda: None, IDS[0], text_name="a", text="b"
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_tensor_of_another_shape_or_dtype_is_refused(case):
    with pytest.raises(TypeCheckError):
        WRONG[case]()


def test_one_of_the_right_shape_is_not():
    assert lora_delta(X.half()[None], torch.zeros(4, 2), torch.zeros(2, 5)).shape == (1, 3, 5)
