"""Products with a norm before and what follows behind them, for the active backend."""

import math

import pytest
import torch
from torch.nn import functional

from lvspec import ops, reference

PARTS = torch.ops.lvspec
DTYPES = [dtype for dtype in ops.float_dtypes("cpu") if dtype != torch.float64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
ROWS = (1, 3, 8, 13, 16, 17)
SIZES = ((37, 300), (2, 3))


def check(got, exact, terms):
    """Of a sum in float64 no further than float32's rounding of its terms and one of the dtype."""
    assert got.shape == exact.shape
    bound = 1e-6 * terms + 0.5 * torch.finfo(got.dtype).eps * exact.abs() + 1e-7
    assert ((got.double() - exact).abs() <= bound).all()


def near(got, theirs, steps=2):
    """To some rounding steps of the largest number of a row: those of what is rounded before."""
    assert got.dtype == theirs.dtype and got.shape == theirs.shape
    bound = steps * max(torch.finfo(got.dtype).eps, 1e-6) * theirs.double().abs().amax(-1, True)
    assert ((got.double() - theirs.double()).abs() <= bound).all()


def operands(rows, outputs, size, dtype):
    x = (torch.randn(rows, size) * torch.logspace(-2, 2, rows)[:, None]).to(dtype)
    return x, torch.randn(size).to(dtype), (torch.randn(outputs, size) / size**0.5).to(dtype)


def test_specification_by_literals():
    """Rows of root mean square 1 and 5; silu(ln 3) is 0.75 ln 3."""
    x = torch.tensor([[1.0, -1.0], [7.0, 1.0]], dtype=torch.float64)
    norm_weight = torch.tensor([1.0, 2.0], dtype=torch.float64)
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    bias = torch.tensor([0.5, 0.0], dtype=torch.float64)
    plain = reference.norm_linear(x, None, 0.0, weight, bias)
    assert plain.tolist() == [[1.5, 0.0], [7.5, 8.0]]
    normed = reference.norm_linear(x, norm_weight, 0.0, weight, None)
    torch.testing.assert_close(normed.tolist(), [[1.0, -1.0], [1.4, 1.8]])
    large = reference.norm_linear(x[:1], norm_weight, 3.0, weight, None)  # sqrt(1 + 3) is 2
    torch.testing.assert_close(large.tolist(), [[0.5, -0.5]])
    weight[0, 0] = logarithm = math.log(3.0)
    gated = reference.norm_gated_linear(x[:1], norm_weight, 0.0, weight)
    torch.testing.assert_close(gated.tolist(), [[-0.75 * logarithm]])
    weight[0, 0] = 1.0
    residual = torch.tensor([[10.0, 20.0], [30.0, 40.0]], dtype=torch.float64)
    assert reference.linear_add_(x, weight, residual) is None
    assert residual.tolist() == [[11.0, 20.0], [37.0, 48.0]]


def test_specification_rounds_where_it_says():
    """Normed rows are rounded; the sum of a product and a residual is, once."""
    bfloat16 = torch.bfloat16
    x, ones = torch.tensor([[1.0, 1.0078125]], dtype=bfloat16), torch.ones(2, dtype=bfloat16)
    # 0.99610 and 1.00388 are kept as 0.99609375 and 1.0; -1.99 would come of them.
    weight = torch.tensor([[256.0, -256.0]], dtype=bfloat16)
    assert reference.norm_linear(x, ones, 0.0, weight, None).item() == -1.0
    # 257.00390625; the product rounded first is 1, and 257 rounded is 256.
    residual = torch.tensor([[256.0]], dtype=bfloat16)
    reference.linear_add_(torch.tensor([[1.0, 2**-8]], dtype=bfloat16), ones[None], residual)
    assert residual.item() == 258.0


@every_dtype
@pytest.mark.parametrize("rows", ROWS)
def test_norm_linear(rows, dtype):
    for outputs, size in SIZES:
        x, norm_weight, weight = operands(rows, outputs, size, dtype)
        for bias in (None, torch.randn(outputs).to(dtype)):
            got = PARTS.norm_linear(x, None, 0.0, weight, bias)
            wide = x.double(), weight.double(), None if bias is None else bias.double()
            terms = functional.linear(*(y if y is None else y.abs() for y in wide))
            assert got.dtype == dtype
            check(got, functional.linear(*wide), terms)
            normed = reference.rms_norm(x, norm_weight, 1e-5)
            got = PARTS.norm_linear(x, norm_weight, 1e-5, weight, bias)
            near(got, functional.linear(normed, weight, bias))


@every_dtype
@pytest.mark.parametrize("rows", ROWS)
def test_norm_gated_linear(rows, dtype):
    for outputs, size in SIZES:
        x, norm_weight, weight = operands(rows, 2 * outputs, size, dtype)
        got = PARTS.norm_gated_linear(x, norm_weight, 1e-5, weight)
        normed = reference.rms_norm(x, norm_weight, 1e-5)
        gate, up = (functional.linear(normed, part) for part in weight.chunk(2))
        near(got, functional.silu(gate) * up, steps=4)


@every_dtype
@pytest.mark.parametrize("rows", ROWS)
def test_linear_add(rows, dtype):
    """A residual between others, whose bits stay."""
    for outputs, size in SIZES:
        x, _, weight = operands(rows, outputs, size, dtype)
        around = torch.randn(rows, 2, outputs + 3).to(dtype)
        residual = around[:, 1, 1:-2]
        before, old = around.clone(), residual.double()
        product = x.double() @ weight.double().T
        assert PARTS.linear_add_(x, weight, residual) is None
        terms = x.double().abs() @ weight.double().abs().T + old.abs()
        check(residual, old + product, terms)
        before[:, 1, 1:-2] = residual
        assert torch.equal(around, before)


def _calls():
    x, norm_weight, weight = operands(3, 6, 8, torch.float32)
    yield "norm_linear", (x, norm_weight, 1e-6, weight, torch.randn(6))
    yield "norm_linear", (x, None, 1e-6, weight, None)
    yield "norm_gated_linear", (x, norm_weight, 1e-6, weight)
    yield "linear_add_", (x, weight, torch.randn(3, 6))


@pytest.mark.parametrize("index", range(4))
def test_operators_are_registered_as_torch_expects(index):
    """Schemas say what is written, fakes have the shapes and types of the results."""
    name, arguments = list(_calls())[index]
    torch.library.opcheck(getattr(PARTS, name).default, arguments)
