"""The gradients of gauge_linear on the CPU: right for every size, dtype and layout, whatever the threads."""

import pytest
import torch
from torch.nn.functional import linear

import gaugekit as gk
from gaugekit.ops.gauge_linear.layout import dense, free_of
from helpers import assert_accurate

BACKWARD = torch.ops.gaugekit.gauge_linear_backward
# (inputs, heads, width): widths that fill registers and not, a head of all inputs, one channel, many inputs left over
SIZES = [(192, 3, 64), (48, 3, 16), (37, 5, 7), (40, 1, 40), (9, 4, 1), (100, 2, 33), (77, 3, 40)]


def operands(size, batch, dtype):
    inputs, heads, width = size
    torch.manual_seed(inputs)
    x, grad = torch.randn(*batch, inputs).to(dtype), torch.randn(*batch, heads * width).to(dtype)
    free = (torch.randn(heads, inputs - width, width) / inputs**0.5).to(dtype)
    rows = torch.stack([torch.randperm(inputs)[:width] for _ in range(heads)]).int()
    return grad, x, free, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_the_dense_products(size, dtype):
    for batch in ((1,), (), (3, 43), (300,)):
        grad, x, free, rows = operands(size, batch, dtype)
        wide = [y.double() if y.is_floating_point() else y for y in (grad, x, free, rows)]
        products = [
            (g @ dense(f, r).mT, free_of(y.reshape(-1, y.shape[-1]).mT @ g.reshape(-1, g.shape[-1]), r))
            for g, y, f, r in (wide, (grad, x, free, rows))
        ]
        found = BACKWARD(grad, x, free, rows, True, True)
        for mine, exact, plain in zip(found, *products, strict=True):
            assert_accurate(mine, exact, plain)
        for of_x, of_free in ((True, False), (False, True), (False, False)):
            dx, dfree = BACKWARD(grad, x, free, rows, of_x, of_free)
            assert torch.equal(dx, found[0]) if of_x else dx.shape == (0,)
            assert torch.equal(dfree, found[1]) if of_free else dfree.shape == (0,)


def test_threads_change_no_bit_of_the_gradient_of_free():
    grad, x, free, rows = operands((192, 3, 64), (900,), torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(BACKWARD(grad, x, free, rows, False, True)[1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_no_rows_give_zeros():
    grad, x, free, rows = operands((48, 3, 16), (0,), torch.float32)
    dx, dfree = BACKWARD(grad, x, free, rows, True, True)
    assert dx.shape == x.shape and dfree.shape == free.shape and not dfree.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(dtype):
    """Views of wider tensors, and rows in another order, give the bits of dense ones."""
    grad, x, free, rows = operands((48, 3, 16), (5, 6), dtype)
    expected = BACKWARD(grad, x, free, rows, True, True)[1]
    columns = torch.cat([grad, grad], -1)[..., :48], torch.cat([x, x], -1)[..., :48]
    turned = [y.transpose(0, 1).contiguous().transpose(0, 1) for y in (grad, x)]
    apart = [torch.stack([y, y], -1)[..., 0] for y in (grad, x)]
    for views in (columns, turned, apart):
        found = BACKWARD(*views, free.mT.contiguous().mT, rows.mT.contiguous().mT, False, True)[1]
        assert torch.equal(found, expected)


def test_what_is_broadcast_is_read_where_it_lies():
    """The gradient of a sum has no memory of its own: strides of 0."""
    _, x, free, rows = operands((48, 3, 16), (5, 6), torch.float32)
    ones = torch.ones(()).expand(5, 6, 48)
    for mine, plain in zip(
        BACKWARD(ones, x, free, rows, True, True),
        BACKWARD(ones.contiguous(), x, free, rows, True, True),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain)


def test_second_derivatives():
    _, x, free, rows = operands((6, 2, 3), (4,), torch.float64)
    leaves = x.requires_grad_(), free.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, free: gk.gauge_linear(x, free, rows), leaves)


def test_what_does_not_fit_is_refused():
    grad, x, free, rows = operands((48, 3, 16), (5,), torch.float32)
    for changed in (
        (grad[:, 1:], x, free, rows),
        (grad[1:], x, free, rows),
        (grad.double(), x, free, rows),
        (grad, x, free[:, 1:], rows),
        (grad, x, free, rows + 48),
        (grad, x, free, rows * 0),
        (grad, x, free, rows.long()),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            BACKWARD(*changed, True, True)


def test_a_step_under_a_compiler_is_the_step_without():
    grad, x, free, rows = operands((48, 3, 16), (5,), torch.float32)
    leaves = [x.requires_grad_(), free.requires_grad_()]

    def step(x, free):
        return torch.autograd.grad(gk.gauge_linear(x, free, rows), [x, free], grad)

    compiled = torch.compile(
        lambda x, free: gk.gauge_linear(x, free, rows), backend="aot_eager", fullgraph=True
    )
    found = torch.autograd.grad(compiled(x, free), leaves, grad)
    for mine, plain in zip(found, step(*leaves), strict=True):
        assert torch.equal(mine, plain)
    naive = torch.autograd.grad(linear(x, dense(free, rows).mT), leaves, grad)
    torch.testing.assert_close(found, naive)
