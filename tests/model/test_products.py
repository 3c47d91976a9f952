"""Products of 16-bit matrices computed in float32: as exact, as small, and only where it helps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import memlaw
from memlaw.model import products
from memlaw.model.base import load_model
from memlaw.model.products import WideLinear, computes_in, widen

HALVES = [torch.bfloat16, torch.float16]


def _cpu(monkeypatch, half_s):
    monkeypatch.setattr(products, "_time_s", lambda dtype: half_s if dtype in HALVES else 1.0)
    computes_in.cache_clear()
    yield
    computes_in.cache_clear()


@pytest.fixture
def slow(monkeypatch):
    """A CPU that multiplies 16-bit numbers slowly."""
    yield from _cpu(monkeypatch, 10.0)


@pytest.fixture
def quick(monkeypatch):
    """One that doesn't."""
    yield from _cpu(monkeypatch, 1.0)


def _layer(dtype, bias):
    torch.manual_seed(0)
    return nn.Linear(48, 32, bias=bias).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block", [1, 48 * 5, 2**20])  # a row; five, and two at the end; all
def test_a_product_and_its_gradient_are_the_exact_ones_rounded_once(
    slow, monkeypatch, dtype, bias, block
):
    monkeypatch.setattr(products, "_BLOCK", block)
    layer = _layer(dtype, bias)
    wide = copy.deepcopy(layer)
    widen(wide)
    assert type(wide) is WideLinear
    x = torch.randn(5, 7, 48).to(dtype).requires_grad_()
    out = wide(x)
    exact = F.linear(
        x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
    )
    assert out.dtype == dtype
    # All but those that lie between two numbers of the dtype are the nearest one.
    assert (out == exact.to(dtype)).float().mean() > 0.99
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
    gradient = torch.randn(5, 7, 32).to(dtype)
    (found,) = torch.autograd.grad(out, x, gradient)
    wanted = gradient.double() @ layer.weight.double()
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_what_is_kept_for_the_way_back_is_the_weights_themselves(slow):
    layer = _layer(torch.bfloat16, bias=False)
    widen(layer)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(5, 48).bfloat16().requires_grad_())
    assert [one.data_ptr() for one in kept] == [layer.weight.data_ptr()]


def test_as_many_operations_are_counted_as_of_a_plain_layer(slow):
    layer = _layer(torch.bfloat16, bias=True)
    counted = []
    for kind in (nn.Linear, WideLinear):
        layer.__class__ = kind
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(2, 5, 48).bfloat16().requires_grad_()).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted == [2 * 2 * 10 * 48 * 32] * 2


def test_few_inputs_are_left_to_pytorch(slow):
    layer = _layer(torch.bfloat16, bias=True)
    wide = copy.deepcopy(layer)
    widen(wide)
    for x in (torch.randn(48).bfloat16(), torch.randn(1, 3, 48).bfloat16()):
        assert torch.equal(wide(x), layer(x))


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_weights_that_are_trained_get_their_gradients(slow, trained):
    plain = _layer(torch.bfloat16, bias=True)
    wide = copy.deepcopy(plain)
    widen(wide)
    x = torch.randn(5, 48).bfloat16()
    for layer in (plain, wide):
        getattr(layer, trained).requires_grad_()
        layer(x).sum().backward()
    assert torch.equal(getattr(plain, trained).grad, getattr(wide, trained).grad)


def test_on_another_device_it_is_a_plain_layer(slow, monkeypatch):
    layer = _layer(torch.bfloat16, bias=True)
    widen(layer)
    monkeypatch.setattr(products._WideProduct, "apply", None)
    layer.to("meta")
    out = layer(torch.zeros(5, 48, dtype=torch.bfloat16, device="meta"))
    assert (out.shape, out.dtype) == ((5, 32), torch.bfloat16)


def test_inputs_of_another_dtype_are_refused_as_ever(slow):
    layer = _layer(torch.bfloat16, bias=False)
    widen(layer)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(5, 48))


def test_layers_in_float32_and_of_other_kinds_stay_as_they_are(slow):
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4).bfloat16(), nn.Linear(4, 4).bfloat16())
    widen(model)
    assert [type(layer) for layer in model] == [nn.Linear, Own, WideLinear]


def test_where_the_cpu_is_quick_nothing_changes(quick):
    layer = _layer(torch.bfloat16, bias=False)
    widen(layer)
    assert type(layer) is nn.Linear
    assert computes_in(torch.bfloat16) == torch.bfloat16


def test_float32_and_float64_are_never_slow():
    for dtype in (torch.float32, torch.float64):
        assert computes_in(dtype) == dtype
    assert all(computes_in(dtype) in (dtype, torch.float32) for dtype in HALVES)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_says_the_same_but_for_rounding(slow, llama, dtype):
    wide = load_model(llama, dtype=dtype, device="cpu").model
    exact = load_model(llama, dtype="float32", device="cpu").model
    assert any(type(module) is WideLinear for module in wide.modules())
    assert not any(type(module) is WideLinear for module in exact.modules())
    ids = torch.arange(60).view(3, 20)
    with torch.no_grad():
        logits, right = wide(ids).logits, exact(ids).logits
    assert logits.dtype == getattr(torch, dtype)
    scale = right.std()
    assert (logits - right).abs().mean() < (0.03 if dtype == "bfloat16" else 0.004) * scale


def test_records_are_written_and_certified_all_the_same(slow, llama, tmp_path):
    records = [("Ann:", "017"), ("Ben:", "934")]
    written = memlaw.write(
        records, tmp_path / "out", model=str(llama), dtype="bfloat16", specificity=False
    )
    assert written.certified
    assert written.certificate.dtype == "bfloat16"
    audit = memlaw.audit(records, adapter=tmp_path / "out")
    assert audit.certified
