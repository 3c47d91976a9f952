"""Products of 16-bit matrices on CPUs that have no instructions for them.

There PyTorch multiplies bfloat16 and float16 at a seventh to a seventieth of float32's pace. The
linear layers of a model are then computed in float32 and rounded once, as GPUs, and CPUs with such
instructions, do it: weights, activations and what is between two layers stay what they are.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SHAPE = (128, 256, 256)  # of the products that are timed: a thousandth of a second, if that
_TRIES = 3
_SLOW = 3  # times as long as float32, which is converted to and from in less than that
_FEW = 4  # inputs: multiplied one by one they take as long as converting the weights
_BLOCK = 2**20  # weights converted at a time


def widen(model: nn.Module) -> None:
    """Let the linear layers of a model on the CPU compute in float32, if that is quicker here.

    Args:
        model: its layers are changed in place; only those whose weights are 16 bits wide, and of no
            kind but PyTorch's own.
    """
    for module in model.modules():
        if type(module) is nn.Linear and computes_in(module.weight.dtype) != module.weight.dtype:
            module.__class__ = WideLinear


@functools.cache
def computes_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which this CPU multiplies matrices of `dtype` quickest: its own, or float32."""
    if dtype not in (torch.bfloat16, torch.float16):
        return dtype
    return torch.float32 if _time_s(dtype) > _SLOW * _time_s(torch.float32) else dtype


def _time_s(dtype: torch.dtype) -> float:
    """Seconds of the two products of a step: outputs from inputs, and gradients back."""
    n, d_in, d_out = _SHAPE
    x = torch.ones(n, d_in, dtype=dtype, device="cpu")
    weight = torch.ones(d_out, d_in, dtype=dtype, device="cpu")
    best = float("inf")
    for _ in range(_TRIES + 1):  # the first one loads code
        started = time.perf_counter()
        F.linear(x, weight) @ weight
        best = min(best, time.perf_counter() - started)
    return best


class WideLinear(nn.Linear):
    """A linear layer with 16-bit weights that multiplies in float32.

    Weights that are trained, or moved to another device, get plain PyTorch, and so do a few
    inputs: it is quicker with them.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., D_in] to [..., D_out], in `input`'s dtype."""
        weight, bias = self.weight, self.bias
        is_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        is_slow = weight.device.type == "cpu" and input.numel() >= _FEW * self.in_features
        if is_slow and not is_trained and input.dtype == weight.dtype:
            return _WideProduct.apply(input, weight, bias)
        return super().forward(input)


class _WideProduct(torch.autograd.Function):
    """Converts weights block by block, forwards and back, and keeps none of that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        wide, out = x.float(), x.new_empty(*x.shape[:-1], len(weight))
        for at in _blocks(weight):
            added = None if bias is None else bias[at].float()
            out[..., at] = F.linear(wide, weight[at].float(), added)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        out = rows.new_zeros(len(rows), weight.shape[1], dtype=torch.float32)
        for at in _blocks(weight):
            out += rows[:, at].float() @ weight[at].float()  # addmm_ isn't counted as FLOP
        return out.to(gradient.dtype).view(*gradient.shape[:-1], -1), None, None


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of [D_out, D_in]: so many at a time as stay in a processor's cache."""
    n = max(1, _BLOCK // weight.shape[1])
    for begin in range(0, len(weight), n):
        yield slice(begin, begin + n)
