"""Compact forms: the same map as the dense weight they stand for, in numbers, gradients, files and compiled code."""

import io

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from gaugekit.nn import Concat, GaugeProjection, forms
from projections import randomised

SIZES = [(12, 3, 4), (12, 2, 3), (5, 1, 5), (7, 2, 1)]


def projection(inputs, heads, width, bias=False, dtype=torch.float64):
    return randomised(GaugeProjection(inputs, heads, width, bias, dtype=dtype))


def dense(module):
    """Worked out one entry at a time, as the formula says."""
    weight = torch.zeros(module.heads, module.inputs, module.width, dtype=module.free.dtype)
    for head in range(module.heads):
        rows = module.rows[head].tolist()
        others = [i for i in range(module.inputs) if i not in rows]
        for slot, row in enumerate(rows):
            weight[head, row, slot] = 1
        for slot, row in enumerate(others):
            weight[head, row] = module.free[head, slot].detach()
    return weight


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_forward_and_gradients(size, bias):
    module = projection(*size, bias)
    weight = dense(module)
    assert torch.equal(module.weight, weight.transpose(1, 2).reshape(-1, size[0]))
    x = torch.randn(2, 5, size[0], dtype=torch.float64, requires_grad=True)
    expected = torch.einsum("btd,hdk->bthk", x, weight).flatten(2)
    if bias:
        expected = expected + module.bias
    out = module(x)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    seed = torch.randn_like(out)
    free, grad_x = torch.autograd.grad((out * seed).sum(), [module.free, x])
    torch.testing.assert_close(
        grad_x, torch.autograd.grad((expected * seed).sum(), x)[0], rtol=1e-12, atol=1e-12
    )
    whole = torch.einsum("btd,bthk->hdk", x, seed.unflatten(2, size[1:]))
    for head in range(size[1]):
        others = [i for i in range(size[0]) if i not in module.rows[head].tolist()]
        torch.testing.assert_close(free[head], whole[head, others], rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda free: torch.func.functional_call(module, {"free": free}, x.detach()), module.free
    )


def test_it_holds_only_the_free_part():
    module = GaugeProjection(384, 12, 32)
    assert sum(p.numel() for p in module.parameters()) == 384 * 384 - 12 * 32 * 32
    assert set(module.state_dict()) == {"free", "rows"}
    assert module.rows.dtype == torch.int32


def test_state_dict_round_trip_through_a_spec():
    module = projection(12, 3, 4, bias=True)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    again = forms.build({"form": "gauge_projection", "arguments": module.arguments}, dtype=torch.float64)
    again.load_state_dict(torch.load(file))
    x = torch.randn(4, 12, dtype=torch.float64)
    assert torch.equal(again(x), module(x))
    assert module.half().rows.dtype == torch.int32 and module.free.dtype == torch.float16


def test_concat():
    parts = [
        {"form": "linear", "arguments": {"inputs": 12, "outputs": 5, "bias": True}},
        {"form": "gauge_projection", "arguments": {"inputs": 12, "heads": 3, "width": 4, "bias": False}},
    ]
    module = forms.build({"form": "concat", "arguments": {"parts": parts}}, dtype=torch.float64)
    assert isinstance(module, Concat)
    assert set(module.state_dict()) == {"0.weight", "0.bias", "1.free", "1.rows"}
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    assert torch.equal(module(x), torch.cat([module[0](x), module[1](x)], -1))


def test_concat_by_groups():
    """Two heads, of each the outputs of all parts together: worked out head by head."""
    parts = [
        {"form": "linear", "arguments": {"inputs": 12, "outputs": 8, "bias": True}},
        {"form": "gauge_projection", "arguments": {"inputs": 12, "heads": 2, "width": 3, "bias": False}},
    ]
    module = forms.build({"form": "concat", "arguments": {"parts": parts, "groups": 2}}, dtype=torch.float64)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    assert set(module.state_dict()) == {"0.weight", "0.bias", "1.free", "1.rows"}
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    first, second = module[0](x), module[1](x)
    expected = [first[..., :4], second[..., :3], first[..., 4:], second[..., 3:]]
    assert torch.equal(module(x), torch.cat(expected, -1))


def test_under_compile():
    module = projection(12, 3, 4, dtype=torch.float32)
    x = torch.randn(6, 12)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    out = compiled(x)
    assert counter.frame_count == 1
    torch.testing.assert_close(out, module(x))
    grads = [torch.autograd.grad(run(x).square().sum(), module.free)[0] for run in (compiled, module)]
    torch.testing.assert_close(*grads)


@pytest.mark.gpu
def test_on_a_gpu():
    module = projection(64, 4, 16)
    x, seed = torch.randn(2, 8, 64, dtype=torch.float64)
    expected = module(x)
    (gradient,) = torch.autograd.grad((expected * seed).sum(), module.free)
    module.cuda()
    out = module(x.cuda())
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad((out * seed.cuda()).sum(), module.free)
    torch.testing.assert_close(found.cpu(), gradient, rtol=1e-12, atol=1e-12)


def test_meta_device():
    module = forms.build(
        {"form": "gauge_projection", "arguments": {"inputs": 8, "heads": 2, "width": 4}}, device="meta"
    )
    assert module.free.is_meta and module.rows.is_meta


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"form": "ternary", "arguments": {}},
            "expected one of concat, gauge_projection, .*linear.*; got 'ternary'",
        ),
        ({"form": "linear"}, "expected"),
        ("linear", "expected"),
        ({"form": "linear", "arguments": {"inputs": 2}}, "arguments do not fit"),
        (
            {"form": "concat", "arguments": {"parts": [], "groups": 0}},
            "groups: expected a positive integer, got 0",
        ),
        ({"form": "gauge_projection", "arguments": {"inputs": 2, "heads": 1, "width": 3}}, "width"),
        ({"form": "gauge_projection", "arguments": {"inputs": 2, "heads": 0, "width": 1}}, "heads"),
        ({"form": "gauge_projection", "arguments": {"inputs": "2", "heads": 1, "width": 1}}, "inputs"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        forms.build(spec)
