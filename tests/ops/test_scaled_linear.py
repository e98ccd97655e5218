"""scaled_linear against exact products, for the active backend."""

import pytest
import torch

from lvspec import ops, reference

DTYPES = [dtype for dtype in ops.float_dtypes("cpu") if dtype != torch.float64]
STORED = [torch.int8, torch.float8_e4m3fn]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
every_stored = pytest.mark.parametrize("stored", STORED, ids=lambda stored: str(stored)[6:])
scaled_linear = torch.ops.lvspec.scaled_linear


def weights_of(outputs, size, stored):
    """All numbers of the type, the largest and smallest among them; factors of several sizes."""
    numbers = torch.arange(-128, 128, dtype=torch.int8)
    if stored == torch.float8_e4m3fn:
        numbers = numbers.view(stored).float()
        numbers = numbers[numbers.isfinite()]
    weight = numbers[torch.randint(len(numbers), (outputs, size))].to(stored)
    return weight, torch.logspace(-4, -1, outputs)[torch.randperm(outputs)]


def check(x, weight, scale, bias):
    """Of the exact result no further than the sum's float32 rounding and one of the dtype."""
    got = scaled_linear(x, weight, scale, bias)
    assert got.dtype == x.dtype and got.shape == (*x.shape[:-1], weight.shape[0])
    wide = x.double(), weight, scale.double(), None if bias is None else bias.double()
    exact = reference.scaled_linear(*wide)
    terms = x.double().abs() @ weight.double().abs().T * scale.double()
    bound = 1e-6 * terms + 0.5 * torch.finfo(x.dtype).eps * exact.abs() + 1e-7
    assert ((got.double() - exact).abs() <= bound).all()
    return got


def same(x, y):
    """Bit by bit where the kernel computes; the specification's sums are BLAS's."""
    if ops.active_backend("cpu") == "triton":
        return torch.equal(x, y)
    error = (x.double() - y.double()).abs().sum()
    return bool(error <= 16 * torch.finfo(x.dtype).eps * y.double().abs().sum())


@every_stored
@every_dtype
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 13, 16, 17, 64])
def test_odd_sizes(rows, with_bias, dtype, stored):
    """Columns that fill no block, and weight rows that fill no tile."""
    for outputs, size in ((37, 700), (1, 1), (16, 512)):
        weight, scale = weights_of(outputs, size, stored)
        bias = torch.randn(outputs).to(dtype) if with_bias else None
        check(torch.randn(1, rows, size).to(dtype), weight, scale, bias)


@every_stored
@every_dtype
def test_many_weight_rows(dtype, stored):
    """Enough of them for the wider tiles."""
    weight, scale = weights_of(4131, 40, stored)
    check(torch.randn(2, 40).to(dtype), weight, scale, None)


@every_dtype
def test_factors_of_the_dtype_of_x(dtype):
    weight, scale = weights_of(20, 64, torch.int8)
    check(torch.randn(3, 64).to(dtype), weight, scale.to(dtype), None)


@every_dtype
def test_strided_rows(dtype):
    """Every other row, every other column, the last position of each sequence."""
    weight, scale = weights_of(20, 40, torch.int8)
    base = torch.randn(3, 6, 80).to(dtype)
    for x in (base[:, ::2, 40:], base[..., ::2], base[:, -1:, :40], base[0, 0, :40]):
        packed = scaled_linear(x.contiguous(), weight, scale, None)
        assert same(check(x, weight, scale, None), packed)
    scale = torch.stack((scale, scale + 1), dim=-1)[:, 0]
    check(base[..., :40], weight, scale, scale.to(dtype))


@every_stored
@every_dtype
def test_rows_do_not_depend_on_each_other(dtype, stored):
    """Nor on rows that are not finite, nor on how many a tile has."""
    weight, scale = weights_of(37, 700, stored)
    x = torch.randn(64, 700).to(dtype)
    for first, count in ((1, 8), (9, 16), (17, 64)):
        whole = scaled_linear(x[:count], weight, scale, None)
        assert same(scaled_linear(x[:first], weight, scale, None), whole[:first])
        beside = x[:count].clone()
        beside[0], beside[first:] = torch.nan, torch.inf
        got = scaled_linear(beside, weight, scale, None)
        assert got[0].isnan().all() and same(got[1:first], whole[1:first])


@every_dtype
def test_what_is_not_finite_stays(dtype):
    x = torch.ones(2, 40, dtype=dtype)
    x[0, 3] = torch.inf
    weight = torch.ones(5, 40, dtype=torch.int8)
    weight[2] = -1
    got = scaled_linear(x, weight, torch.ones(5), None)
    assert got[0].tolist() == [torch.inf, torch.inf, -torch.inf, torch.inf, torch.inf]
    assert (got[1].abs() == 40).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_stored
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_device(dtype, stored):
    """And there a row has the same bits in tiles of every size."""
    if stored != torch.int8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 on this chip")
    for outputs, size in ((37, 700), (2048, 2048), (4864, 896), (896, 4864)):
        weight, scale = (x.cuda() for x in weights_of(outputs, size, stored))
        x = torch.randn(100, size, device="cuda").to(dtype)
        bias = torch.randn(outputs, device="cuda").to(dtype)
        whole = check(x, weight, scale, bias)
        for rows in (1, 8, 13, 16, 17, 64):
            assert torch.equal(scaled_linear(x[:rows], weight, scale, bias), whole[:rows])


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_operator_is_registered_as_torch_expects(with_bias):
    weight, scale = weights_of(6, 16, torch.int8)
    bias = torch.randn(6) if with_bias else None
    torch.library.opcheck(scaled_linear.default, (torch.randn(2, 3, 16), weight, scale, bias))
