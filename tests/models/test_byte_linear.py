"""ByteLinear: which kernel multiplies quantised weights, and what comes out.

Weights are ordinary ones with the attributes that torchao's have, so torchao is not needed; its own
run through the same code in `test_quantization.py`.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lvspec.models import byte_linear
from lvspec.models.byte_linear import MAX_ROWS, ByteLinear
from lvspec.reference import scaled_linear

INT8, FP8 = torch.int8, torch.float8_e4m3fn
KERNELS = {"_weight_int8pack_mm", "scaled_linear"}


def quantised(dtype, stored, *, outputs=96, size=128, with_bias=True):
    """A layer as torchao leaves it; its own product is of the expanded weights."""
    layer = nn.Linear(size, outputs, bias=with_bias, dtype=dtype)
    scale = layer.weight.detach().float().abs().amax(1, keepdim=True) / 127
    numbers = layer.weight.detach().float() / scale
    numbers = (numbers.round() if stored == INT8 else numbers).to(stored)
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
    monkeypatch.setattr(byte_linear, "active_backend", lambda device_type: "triton")


@pytest.fixture
def as_on_a_cpu(monkeypatch):
    monkeypatch.setattr(byte_linear, "active_backend", lambda device_type: "cpp")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("stored", [INT8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(as_on_a_gpu, dtype, stored, with_bias):
    layer = quantised(dtype, stored, with_bias=with_bias)
    ByteLinear.take_over(layer)
    assert type(layer) is ByteLinear
    most = MAX_ROWS["scaled_linear"]
    for shape in ((), (1, 1), (2, 3), (1, most)):
        check(layer, shape, dtype, ["scaled_linear"])
    check(layer, (1, most + 1), dtype, [])


@pytest.mark.parametrize("with_bias", [False, True])
def test_on_a_cpu(as_on_a_cpu, with_bias):
    layer = quantised(torch.bfloat16, INT8, with_bias=with_bias)
    ByteLinear.take_over(layer)
    most = MAX_ROWS["int8pack"]
    for shape in ((1, 1), (2, 3), (1, most)):
        check(layer, shape, torch.bfloat16, ["_weight_int8pack_mm"])
    check(layer, (1, most + 1), torch.bfloat16, [])


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float32, INT8), (torch.float16, INT8), (torch.bfloat16, FP8)],
)
def test_torch_has_no_other_kernel_on_a_cpu(as_on_a_cpu, dtype, stored):
    layer = quantised(dtype, stored)
    ByteLinear.take_over(layer)
    assert type(layer) is nn.Linear


def test_chips_without_float8(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(byte_linear, "_converts_from_float8", lambda device: False)
    layers = {stored: quantised(torch.bfloat16, stored) for stored in (INT8, FP8)}
    for layer in layers.values():
        ByteLinear.take_over(layer)
    assert type(layers[FP8]) is nn.Linear and type(layers[INT8]) is ByteLinear


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), False), ((8, 9), True)])
def test_what_converts_from_float8(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert byte_linear._converts_from_float8.__wrapped__(torch.device("cuda", 0)) == expected
    assert byte_linear._converts_from_float8.__wrapped__(torch.device("cpu"))


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
