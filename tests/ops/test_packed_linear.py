"""Products with packed weights: their bits, their types, what they add (csrc/packed_linear.h)."""

import pytest
import torch
from torch.nn import functional as F

from lvspec import ops
from lvspec.ops.cpp_backend import instruction_set

pytestmark = pytest.mark.skipif(
    ops.active_backend("cpu") != "cpp", reason="needs the C++ operations"
)

OPS = torch.ops.lvspec
UNIT = 2.0**-24  # of float32's rounding
TYPES = (torch.float16, torch.bfloat16, torch.float32)
CHAIN = 128  # products that are added up before sums of them are
ROWS = (*range(1, 16), 25, 28, 41, 64, 128)
# Outputs and inputs: single ones, odd ones, whole panels, several chains of inputs.
SIZES = ((1, 1), (1, 40), (5, 1), (27, 7), (32, 256), (100, 300), (65, 1100), (7, 2049))
every_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])


def weights(outputs, inputs, dtype):
    """Random ones of which `dtype` holds all and no narrower type of TYPES does."""
    weight = torch.randn(outputs, inputs).to(dtype).float()
    if dtype == torch.bfloat16:
        weight[0, 0] = 2.0**20
    elif dtype == torch.float32:
        weight[-1, -1] = 1 / 3
    return weight


def is_packed_in(dtype):
    """What weights are packed in of which `dtype` is the narrowest that has them all."""
    # Without an instruction that widens them, numbers of float16 are kept in float32.
    is_plain = dtype == torch.float16 and instruction_set() == "portable"
    return torch.float32 if is_plain else dtype


def linear(x, weight, bias=None, residual=None):
    return OPS.cpu_packed_linear(x, OPS.cpu_pack(weight, False), len(weight), bias, residual)


def gated(x, gate, up):
    return OPS.cpu_packed_gated_linear(x, OPS.cpu_pack(torch.cat((gate, up)), True), len(gate))


def product(x, weight):
    """x W^T in float64, and a bound of the error of a sum in chains of products."""
    x, weight = x.double(), weight.double()
    inputs = x.shape[-1]
    roundings = 1 + min(inputs, CHAIN) + (inputs + CHAIN - 1) // CHAIN
    return x @ weight.T, 1.01 * UNIT * roundings * (x.abs() @ weight.abs().T)


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@every_type
def test_products(outputs, inputs, dtype):
    weight, bias = weights(outputs, inputs, dtype), torch.randn(outputs)
    packed = OPS.cpu_pack(weight, False)
    assert packed.dtype == is_packed_in(dtype) and packed.dim() == 1
    for rows in (1, 2, 3, 6, 13, 29):
        x, residual = torch.randn(rows, inputs), torch.randn(rows, outputs)
        exact, bound = product(x, weight)
        for b, r in ((None, None), (bias, None), (None, residual), (bias, residual)):
            got = OPS.cpu_packed_linear(x, packed, outputs, b, r)
            wanted, error = exact, bound
            for term in (b, r):
                if term is not None:
                    wanted = wanted + term.double()
                    error = error + UNIT * (wanted.abs() + error)
            assert got.shape == wanted.shape
            assert ((got - wanted).abs() <= error).all()


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@every_type
def test_gated_products(outputs, inputs, dtype):
    gate, up = weights(outputs, inputs, dtype), weights(outputs, inputs, dtype)
    for rows in (1, 2, 3, 6, 13, 29):
        x = torch.randn(rows, inputs)
        (gates, gate_error), (ups, up_error) = product(x, gate), product(x, up)
        wanted = F.silu(gates) * ups
        # silu grows at most 1.1 times as fast as its argument; its own roundings are below 8.
        slack = gates.abs() * 8 * UNIT + 1.1 * gate_error
        error = slack * (ups.abs() + up_error) + F.silu(gates).abs() * up_error
        error += UNIT * (wanted.abs() + error) + torch.finfo(torch.float32).tiny
        assert ((gated(x, gate, up) - wanted).abs() <= error).all()


@every_type
def test_products_of_whole_numbers_are_exact(dtype):
    weight = torch.randint(-8, 9, (77, 700)).float()
    # What the other types of 16 bits have not.
    weight[3, 5] = {torch.float16: 257, torch.bfloat16: 2**17}.get(dtype, 2**17 + 1)
    x = torch.randint(-8, 9, (33, 700)).float()
    x[:, 5] = x[:, 5].sign()
    assert OPS.cpu_pack(weight, False).dtype == is_packed_in(dtype)
    assert torch.equal(linear(x, weight), x @ weight.T)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("outputs", "inputs"), [(27, 7), (300, 513), (700, 256)])
@every_type
def test_bits_do_not_depend_on_other_rows_nor_on_threads(outputs, inputs, dtype, threads):
    gate, up = weights(outputs, inputs, dtype), weights(outputs, inputs, dtype)
    packed, gates = OPS.cpu_pack(up, False), OPS.cpu_pack(torch.cat((gate, up)), True)
    x, bias = torch.randn(max(ROWS), inputs), torch.randn(outputs)
    residual = torch.randn(max(ROWS), outputs)

    def both(begin, end):
        rows = slice(begin, end)
        return (
            OPS.cpu_packed_linear(x[rows], packed, outputs, bias, residual[rows]),
            OPS.cpu_packed_gated_linear(x[rows], gates, outputs),
        )

    alone = [torch.cat(of) for of in zip(*(both(r, r + 1) for r in range(len(x))), strict=True)]
    torch.set_num_threads(threads)
    try:
        results = {rows: both(0, rows) for rows in ROWS}
    finally:
        torch.set_num_threads(1)
    for rows, got in results.items():
        for ours, theirs in zip(got, alone, strict=True):
            assert torch.equal(ours, theirs[:rows]), rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("rows", [1, 3, 13, 40])
def test_bits_do_not_depend_on_the_type_of_the_packed_weights(rows, dtype):
    weight, x = weights(70, 600, dtype), torch.randn(rows, 600)
    wider = torch.cat((weight, torch.full((1, 600), 1 / 3)))
    assert OPS.cpu_pack(wider, False).dtype == torch.float32
    assert torch.equal(linear(x, weight), linear(x, wider)[:, :70])


def test_what_has_been_packed_is_the_weights_themselves():
    """All finite numbers of both 16-bit types, multiplied by 1."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
        every = every[every.isfinite()]
        weight = every.view(-1, 256)
        assert OPS.cpu_pack(weight, False).dtype == is_packed_in(dtype)
        assert torch.equal(linear(torch.eye(256), weight), weight.T)
        assert torch.equal(linear(torch.eye(256)[:1], weight), weight.T[:1])


def test_the_narrowest_type_in_which_all_are_exact():
    def chosen(*numbers):
        return OPS.cpu_pack(torch.tensor([[1.0, *numbers]]), False).dtype

    half, brain, full = (is_packed_in(dtype) for dtype in TYPES)
    both = half if instruction_set() != "portable" else brain
    assert chosen() == chosen(0.0, -0.0) == chosen(1 + 2**-7, -(2.0**-24)) == both
    assert chosen(65504) == chosen(1 + 2**-10) == chosen(3 * 2.0**-24, 1 + 2**-10) == half
    assert chosen(65536) == chosen(2.0**-25) == chosen(-(2.0**-133)) == chosen(2.0**127) == brain
    assert chosen(1 + 2**-10, 65536) == chosen(1 + 2**-11) == chosen(2.0**-149) == full
    assert chosen(float("inf")) == chosen(float("nan")) == chosen(float("-inf")) == full
    bits = torch.randint(-(2**31), 2**31 - 1, (4000,), dtype=torch.int64).to(torch.int32)
    bits[::2] &= ~0x1FFF
    bits[::3] &= ~0xFFFF
    bits[1::2] = (bits[1::2] & ~0x7F000000) | 0x38000000  # about 2^-14
    for x in bits.view(torch.float32):
        kept = [dtype for dtype in TYPES if x.isfinite() and torch.equal(x.to(dtype).float(), x)]
        kept = [dtype for dtype in kept if dtype == is_packed_in(dtype)]
        assert chosen(x.item()) == (kept or [full])[0], x.item()


def test_one_exception_among_many_is_found():
    """By every thread, at every place."""
    torch.set_num_threads(2)
    try:
        for place in (0, 5000, 150_000, 299_999):
            weight = torch.zeros(300, 1000)
            weight.view(-1)[place] = 1 + 2**-11
            assert OPS.cpu_pack(weight, False).dtype == torch.float32
            column = place % 1000
            got = linear(torch.eye(1000)[column : column + 1], weight)
            assert torch.equal(got[0], weight[:, column])
    finally:
        torch.set_num_threads(1)


def test_views_and_batches():
    weight, x = torch.randn(50, 38), torch.randn(3, 5, 19)
    part = weight[:, ::2]
    assert torch.equal(linear(x, part), linear(x.reshape(15, 19), part.contiguous()).view(3, 5, 50))
    across = torch.randn(19, 4).T
    assert torch.equal(linear(across, part), linear(across.contiguous(), part))
    assert linear(x[:0], part).shape == (0, 5, 50)


def test_concatenated_matrices_are_one_product():
    q, k, v = (torch.randn(size, 64) for size in (48, 20, 20))
    x = torch.randn(13, 64)
    whole = linear(x, torch.cat((q, k, v)))
    assert torch.equal(whole, torch.cat([linear(x, part) for part in (q, k, v)], -1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.cpu_pack(torch.zeros(4), False), "weight: expected two dimensions, got 1"),
        (lambda: OPS.cpu_pack(torch.zeros(3, 2), True), "weight: expected as many gates as ups"),
        (lambda: OPS.cpu_pack(torch.zeros(3, 2).half(), False), "weight: expected float32"),
        (lambda: OPS.cpu_packed_linear(torch.zeros(2, 8), torch.zeros(8), 9, None, None), "packed"),
        (lambda: linear(torch.zeros(2, 4).double(), torch.zeros(3, 4)), "x: expected float32"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
