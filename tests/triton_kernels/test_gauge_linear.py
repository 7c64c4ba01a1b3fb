"""The Triton kernels of gauge_linear against the float64 oracle: odd widths, rests of tiles, strides, splits."""

import pytest
import torch
from torch.nn.functional import linear

from gaugekit.ops.gauge_linear.layout import dense, free_of
from gaugekit.reference.gauge_linear import gauge_linear as reference
from gaugekit.triton_kernels import gauge_linear as kernels
from helpers import assert_accurate
from triton_cases import DEVICE, DTYPES

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
# (rows, inputs, heads, width): one tile and several, a head as wide as the inputs less one, tiles not filled
SIZES = {"small": (5, 20, 2, 3), "tiles": (70, 96, 3, 32), "odd": (33, 25, 2, 24)}


def operands(size, dtype):
    count, inputs, heads, width = size
    rows = torch.stack([torch.randperm(inputs)[:width] for _ in range(heads)]).int()
    x = (torch.randn(count, inputs) / inputs**0.5).to(dtype)
    return x, torch.randn(heads, inputs - width, width).to(dtype), rows, torch.randn(heads * width).to(dtype)


def here(*tensors):
    return [x.to(DEVICE) for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_forward(size, dtype):
    x, free, rows, bias = operands(SIZES[size], dtype)
    weight = dense(free, rows).mT
    for shift in (None, bias):
        out = torch.empty(len(x), rows.numel() + 3, dtype=dtype, device=DEVICE)
        device_bias = None if shift is None else shift.to(DEVICE)
        kernels.gauge_linear(out[:, 3:], *here(x, free, rows), device_bias)
        exact = reference(x.double(), free.double(), rows, None if shift is None else shift.double())
        assert_accurate(out[:, 3:].cpu(), exact, linear(x, weight, shift))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_backward(size, dtype):
    x, free, rows, _ = operands(SIZES[size], dtype)
    grad = torch.randn(len(x), rows.numel()).to(dtype)
    weight = dense(free, rows)
    dx, dfree = torch.empty_like(x, device=DEVICE), torch.empty_like(free, device=DEVICE)
    kernels.gauge_linear_backward_x(dx, *here(grad, free, rows))
    kernels.gauge_linear_backward_free(dfree, *here(grad, x, rows))
    assert_accurate(dx.cpu(), grad.double() @ weight.double().mT, grad @ weight.mT)
    exact, naive = ((x.to(kind).mT @ grad.to(kind)) for kind in (torch.float64, dtype))
    assert_accurate(dfree.cpu(), free_of(exact, rows), free_of(naive, rows))


def test_many_rows_are_added_up_in_splits(monkeypatch):
    monkeypatch.setattr(kernels, "ROWS_OF_A_SPLIT", 32)
    x, free, rows, _ = operands((70, 20, 2, 3), torch.float32)
    grad = torch.randn(70, 6)
    dfree = torch.empty_like(free, device=DEVICE)
    kernels.gauge_linear_backward_free(dfree, *here(grad, x, rows))
    assert_accurate(dfree.cpu(), free_of(x.double().mT @ grad.double(), rows), free_of(x.mT @ grad, rows))


def test_strides():
    """Columns of wider matrices, and a bias with a stride, give the bits of dense ones."""
    x, free, rows, bias = here(*operands(SIZES["small"], torch.float32))
    apart = [torch.stack([y, y], -1)[..., 0] for y in (x, bias)]
    first, second = (torch.empty(5, 6, device=DEVICE) for _ in range(2))
    kernels.gauge_linear(first, x, free, rows, bias)
    kernels.gauge_linear(second, apart[0], free, rows, apart[1])
    assert torch.equal(first, second)


def inside_nans(x):
    """The numbers of ``x`` [rows, columns], with NaN before and behind every row and around them all."""
    wide = x.new_full((len(x) + 4, x.shape[1] + 80), float("nan"), device=DEVICE)
    inner = wide[2:-2, 40:-40]
    return inner.copy_(x)


def between_nans(x):
    """The numbers of ``x``, dense, with NaN before and behind them."""
    pad = 64 * x.shape[-1]
    return x.new_full((x.numel() + 2 * pad,), float("nan"), device=DEVICE)[pad:-pad].view(x.shape).copy_(x)


@pytest.mark.parametrize("wrong", [-1, -9, 20, 29, 2**31 - 1, -(2**31), "first", "last"])
def test_damaged_rows_read_nothing_outside(wrong):
    """Rows out of range act as the nearest that is in it, repeated ones give some numbers; no neighbour is read."""
    x, free, rows, _ = operands(SIZES["small"], torch.float32)
    if isinstance(wrong, str):
        rows.fill_(0 if wrong == "first" else 19)
    else:
        rows[:, 1] = wrong
    grad = torch.randn(5, 6)
    results = []
    for given in (rows, rows.clamp(0, 19)):
        out, dx, dfree = (torch.empty(*shape, device=DEVICE) for shape in ((5, 6), (5, 20), (2, 17, 3)))
        kernels.gauge_linear(out, inside_nans(x), between_nans(free), given.to(DEVICE), None)
        kernels.gauge_linear_backward_x(dx, inside_nans(grad), between_nans(free), given.to(DEVICE))
        kernels.gauge_linear_backward_free(dfree, inside_nans(grad), inside_nans(x), given.to(DEVICE))
        results.append((out, dx, dfree))
    for damaged, clamped in zip(*results, strict=True):
        assert damaged.isfinite().all() and torch.equal(damaged, clamped)


def test_addresses_beyond_32_bits(tmp_path):
    """Columns whose distance times their number is past 2³¹ elements, in a sparse file on the CPU."""
    apart, columns = 2**27, 20
    size = apart * (columns - 1) + 2**16
    if DEVICE == "cuda":
        far = torch.empty(size, dtype=torch.float16, device=DEVICE)
    else:
        path = tmp_path / "sparse"
        with open(path, "wb") as file:
            file.truncate(2 * size)
        far = torch.from_file(str(path), shared=True, size=size, dtype=torch.float16)
    x, free, rows, _ = here(*operands((2, columns, 2, 10), torch.float16))
    outputs = []
    for given in (x, far.as_strided((2, columns), (1, apart)).copy_(x)):
        out, dx, dfree = torch.empty_like(x), torch.empty_like(x), torch.empty_like(free)
        kernels.gauge_linear(out, given, free, rows, None)
        kernels.gauge_linear_backward_x(dx, given, free, rows)
        kernels.gauge_linear_backward_free(dfree, given, given, rows)
        outputs.append((out, dx, dfree))
    assert all(map(torch.equal, *outputs))
