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
