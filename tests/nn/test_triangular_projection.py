"""The form of a turned head: the dense map without its zeros, in numbers, gradients, files and compiled code."""

import copy
import io

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear

from gaugekit.nn import GaugeProjection, TriangularProjection, forms
from gaugekit.nn.triangle import pack_triangle, triangle_size, unpack_triangle
from gaugekit.ops.gauge_linear.layout import free_rows

SIZES = [(12, 3, 4), (12, 2, 3), (5, 1, 5), (7, 2, 1)]


def projection(inputs, heads, width, bias=False, padded=None, dtype=torch.float64):
    module = TriangularProjection(inputs, heads, width, bias, padded, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    module.rows.copy_(torch.stack([torch.randperm(inputs)[:width] for _ in range(heads)]))
    return module


def dense(module):
    """Worked out one entry at a time, as the formula says: [heads, D, width]."""
    weight = torch.zeros(module.heads, module.inputs, module.width, dtype=module.free.dtype)
    for head in range(module.heads):
        rows = module.rows[head].tolist()
        numbers = iter(module.triangle[head].tolist())
        for place, row in enumerate(rows):
            for channel in range(place + 1):
                weight[head, row, channel] = next(numbers)
        for place, row in enumerate(i for i in range(module.inputs) if i not in rows):
            weight[head, row] = module.free[head, place].detach()
    return weight


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_gradients(size, bias):
    module = projection(*size, bias)
    weight = dense(module).requires_grad_()
    flat = weight.transpose(1, 2).reshape(-1, size[0])
    assert torch.equal(module.weight, flat)
    x = torch.randn(2, 5, size[0], dtype=torch.float64, requires_grad=True)
    expected, out = linear(x, flat, module.bias), module(x)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    seed = torch.randn_like(out)
    found = torch.autograd.grad((out * seed).sum(), [x, module.free, module.triangle])
    right, whole = torch.autograd.grad((expected * seed).sum(), [x, weight])

    def rows_of(index):
        return whole.gather(1, index.long()[..., None].expand(-1, -1, size[2]))

    free, block = rows_of(free_rows(module.rows, size[0])), rows_of(module.rows)
    for mine, theirs in zip(found, (right, free, pack_triangle(block)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert module.product == ("dense", "a triangle leaves no product out")


def test_it_holds_all_but_the_zeros():
    module = TriangularProjection(384, 12, 32)
    assert sum(p.numel() for p in module.parameters()) == 384 * 384 - 12 * (32 * 31 // 2)
    assert set(module.state_dict()) == {"free", "triangle", "rows"}
    assert module.rows.dtype == torch.int32 and module.triangle.shape == (12, triangle_size(32))


def test_triangles_are_packed_row_by_row():
    lower = torch.arange(1.0, 19).view(2, 3, 3).tril()
    assert pack_triangle(lower).tolist() == [[1, 4, 5, 7, 8, 9], [10, 13, 14, 16, 17, 18]]
    assert torch.equal(unpack_triangle(pack_triangle(lower), 3), lower)
    assert torch.autograd.gradcheck(
        lambda x: unpack_triangle(x, 3), torch.randn(2, 6).double().requires_grad_()
    )


def test_padding_is_zeros_behind_each_head():
    module, x = projection(12, 3, 4, padded=6), torch.randn(2, 12, dtype=torch.float64)
    out = module(x).unflatten(-1, (3, 6))
    torch.testing.assert_close(out[..., :4].flatten(-2), linear(x, module.weight), rtol=1e-13, atol=1e-13)
    assert out[..., 4:].count_nonzero() == 0


def test_a_step_of_training_is_that_of_the_dense_layer_projected_on_it():
    """Plain gradient descent on the dense weight, its zeros put back, is the step of what is stored."""
    module, x = projection(12, 3, 4), torch.randn(9, 12, dtype=torch.float64)
    target = torch.randn(9, 12, dtype=torch.float64)
    plain = torch.nn.Linear(12, 12, bias=False, dtype=torch.float64)
    plain.weight.data.copy_(module.weight.detach())
    for layer in (module, plain):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            (layer(x) - target).square().sum().backward()
            optimizer.step()
            if layer is plain:
                for head, rows in zip(
                    plain.weight.data.unflatten(0, (3, 4)), module.rows.long(), strict=True
                ):
                    head[:, rows] = head[:, rows].triu()  # outputs by inputs: the triangle lies on its side
    torch.testing.assert_close(module.weight.detach(), plain.weight.detach(), rtol=1e-12, atol=1e-12)


def test_what_is_written_to_it_is_seen():
    """In evaluation mode the dense weight is made once, and again when any of what it is made of changes."""
    module, x = projection(12, 3, 4).eval().requires_grad_(False), torch.randn(5, 12, dtype=torch.float64)
    module(x)
    kept = module._kept.tensor
    module(x)
    assert module._kept.tensor is kept
    for name in ("free", "triangle", "rows"):
        tensor = getattr(module, name)
        tensor.copy_(tensor.flip(-1))
        assert torch.equal(module(x), linear(x, module.weight)), name
        assert module._kept.tensor is not kept
        kept = module._kept.tensor
    assert torch.equal(copy.deepcopy(module)(x), module(x)) and copy.deepcopy(module)._kept is None


def test_state_dict_round_trip_through_a_spec():
    module = projection(12, 3, 4, bias=True)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    again = forms.build({"form": "triangular_projection", "arguments": module.arguments}, dtype=torch.float64)
    again.load_state_dict(torch.load(file))
    x = torch.randn(4, 12, dtype=torch.float64)
    assert type(again) is TriangularProjection and torch.equal(again(x), module(x))
    assert module.half().rows.dtype == torch.int32 and module.triangle.dtype == torch.float16
    meta = forms.build({"form": "triangular_projection", "arguments": module.arguments}, device="meta")
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    with pytest.raises(ValueError, match="width: expected at most inputs=2, got 3"):
        TriangularProjection(2, 1, 3)


def test_under_compile():
    module, x = projection(12, 3, 4, dtype=torch.float32), torch.randn(6, 12)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    torch.testing.assert_close(compiled(x), module(x))
    assert counter.frame_count == 1
    grads = [torch.autograd.grad(run(x).square().sum(), module.triangle)[0] for run in (compiled, module)]
    torch.testing.assert_close(*grads)


def test_a_triangle_of_ones_on_the_diagonal_is_the_other_form():
    one, other = projection(12, 3, 4), GaugeProjection(12, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        one.triangle.copy_(pack_triangle(torch.eye(4, dtype=torch.float64).expand(3, -1, -1)))
    other.load_state_dict({name: x for name, x in one.state_dict().items() if name != "triangle"})
    assert torch.equal(one.weight, other.weight)


@pytest.mark.gpu
def test_on_a_gpu():
    module = projection(64, 4, 16)
    x, seed = torch.randn(2, 8, 64, dtype=torch.float64), torch.randn(2, 8, 64, dtype=torch.float64)
    expected = module(x)
    (gradient,) = torch.autograd.grad((expected * seed).sum(), module.triangle)
    module.cuda()
    out = module(x.cuda())
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad((out * seed.cuda()).sum(), module.triangle)
    torch.testing.assert_close(found.cpu(), gradient, rtol=1e-12, atol=1e-12)
