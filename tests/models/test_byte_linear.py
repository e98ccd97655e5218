"""ByteLinear: which kernel multiplies quantised weights, and what comes out.

Weights are ordinary ones with the attributes that torchao's have, so torchao is not needed; its own
run through the same code in `test_quantization.py`.
"""

import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lvspec.models.byte_linear import MAX_PACKED_ROWS, ByteLinear
from lvspec.ops.scaled_linear import MAX_ROWS
from lvspec.reference import scaled_linear

INT8, FP8 = torch.int8, torch.float8_e4m3fn
KERNELS = {"_weight_int8pack_mm", "scaled_linear"}


def quantised(dtype, stored, *, outputs=96, size=128, with_bias=True):
    """A layer as torchao leaves it; its own product is of the expanded weights."""
    layer = nn.Linear(size, outputs, bias=with_bias, dtype=dtype)
    scale = layer.weight.detach().float().abs().amax(1, keepdim=True) / 127
    numbers = (layer.weight.detach().float() / scale).round().to(stored)
    layer.weight = nn.Parameter((numbers.float() * scale).to(dtype), requires_grad=False)
    layer.weight.qdata, layer.weight.scale = numbers, scale
    layer.weight.act_quant_kwargs = None
    return layer


class Kernels(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.seen += [name] if name in KERNELS else []
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def check(layer, shape, dtype, kernels):
    """That these kernels ran, and gave what the weights say."""
    x = torch.randn(*shape, layer.in_features).to(dtype)
    weight, bias = layer.weight, None if layer.bias is None else layer.bias.double()
    exact = scaled_linear(x.double(), weight.qdata, weight.scale.flatten(), bias)
    with Kernels() as ran:
        got = layer(x)
    assert ran.seen == kernels
    assert got.shape == exact.shape and got.dtype == dtype
    bound = (4e-7 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps) * 4
    assert (got - exact).abs().max() <= bound * exact.abs().max()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    _as_with(monkeypatch, "triton")


@pytest.fixture
def as_on_a_cpu(monkeypatch):
    _as_with(monkeypatch, "cpp")


def _as_with(monkeypatch, backend):
    for module in ("lvspec.models.byte_linear", "lvspec.ops.scaled_linear"):
        monkeypatch.setattr(sys.modules[module], "active_backend", lambda device_type: backend)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(as_on_a_gpu, dtype, with_bias):
    layer = quantised(dtype, INT8, with_bias=with_bias)
    ByteLinear.take_over(layer)
    assert type(layer) is ByteLinear
    for shape in ((), (1, 1), (2, 3), (1, MAX_ROWS)):
        check(layer, shape, dtype, ["scaled_linear"])
    check(layer, (1, MAX_ROWS + 1), dtype, [])


@pytest.mark.parametrize("with_bias", [False, True])
def test_on_a_cpu(as_on_a_cpu, with_bias):
    layer = quantised(torch.bfloat16, INT8, with_bias=with_bias)
    ByteLinear.take_over(layer)
    for shape in ((1, 1), (2, 3), (1, MAX_PACKED_ROWS)):
        check(layer, shape, torch.bfloat16, ["_weight_int8pack_mm"])
    check(layer, (1, MAX_PACKED_ROWS + 1), torch.bfloat16, [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_cpu_in_other_types(as_on_a_cpu, dtype):
    layer = quantised(dtype, INT8)
    ByteLinear.take_over(layer)
    check(layer, (1, MAX_ROWS), dtype, ["scaled_linear"])
    check(layer, (1, MAX_ROWS + 1), dtype, [])


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float64, INT8), (torch.float32, FP8), (torch.bfloat16, FP8)],
)
def test_what_has_no_kernel(as_on_a_cpu, dtype, stored):
    layer = quantised(dtype, stored)
    ByteLinear.take_over(layer)
    assert type(layer) is nn.Linear


def test_a_layer_that_was_converted_since(as_on_a_gpu):
    layer = quantised(torch.float32, INT8)
    ByteLinear.take_over(layer)
    layer.weight.qdata = layer.weight.qdata.to("meta")
    with Kernels() as ran:
        layer(torch.randn(2, 128))
    assert not ran.seen


@pytest.mark.parametrize(
    "spoil",
    [
        lambda layer: delattr(layer.weight, "scale"),
        lambda layer: setattr(layer.weight, "act_quant_kwargs", {}),
        lambda layer: setattr(layer.weight, "act_pre_scale", torch.ones(1)),
        lambda layer: setattr(layer.weight, "qdata", layer.weight.qdata.to(torch.uint8)),
        lambda layer: setattr(layer.weight, "qdata", layer.weight.qdata.t().contiguous().t()),
        lambda layer: setattr(layer.weight, "qdata", layer.weight.qdata[:, ::2]),
        lambda layer: setattr(layer.weight, "scale", torch.ones(96, 2)),
        lambda layer: setattr(layer, "__class__", type("Other", (nn.Linear,), {})),
    ],
)
def test_other_layers_are_left_alone(as_on_a_gpu, spoil):
    layer = quantised(torch.bfloat16, INT8)
    spoil(layer)
    before = type(layer)
    ByteLinear.take_over(layer)
    assert type(layer) is before
