"""A projection that skips its identity blocks: against the reference, in every layout, with every option."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear

import gaugekit as gk
from gaugekit import _library
from gaugekit.ops.gauge_linear import cuda, operator
from gaugekit.ops.gauge_linear.layout import dense, free_of, free_rows
from gaugekit.reference.gauge_linear import gauge_linear as reference
from helpers import assert_accurate

# (inputs, heads, width): tiles of every size and their rests, no free input, one input, grouped heads
SIZES = [(12, 3, 4), (40, 2, 20), (70, 2, 35), (48, 1, 48), (1, 1, 1), (96, 5, 16), (130, 2, 65)]
BATCHES = [1, 2, 3, 5, 6, 7, 15, 31]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = ("x", "free", "rows", "bias", "weight", "weight_bias")


def operands(size=(12, 3, 4), batch=(5,), dtype=torch.float64, options="bwc", grad=False):
    """x, free, rows, bias, weight, weight_bias; ``options`` names those of b, w, c (weight_bias) that are there."""
    inputs, heads, width = size
    rows = torch.stack([torch.randperm(inputs)[:width] for _ in range(heads)]).int()

    def random(*shape):
        return torch.randn(*shape).div(inputs**0.5).to(dtype).requires_grad_(grad)

    return (
        random(*batch, inputs),
        random(heads, inputs - width, width),
        rows,
        random(heads * width) if "b" in options else None,
        random(7, inputs) if "w" in options else None,
        random(7) if "c" in options else None,
    )


def wide(given):
    return [x.double() if x is not None and x.is_floating_point() else x for x in given]


def plain(x, free, rows, bias, weight, weight_bias):
    """What a good user would write: one dense product."""
    y = linear(x, dense(free, rows).mT.contiguous(), bias)
    return y if weight is None else torch.cat([linear(x, weight, weight_bias), y], -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_the_reference(size, dtype):
    for batch, options in zip(BATCHES, ("", "b", "w", "bwc", "wc", "bw", "", "bwc"), strict=True):
        given = operands(size, (batch,), dtype, options)
        assert_accurate(gk.gauge_linear(*given), reference(*wide(given)), plain(*given))


def test_many_rows_are_the_few_rows_one_after_the_other():
    """However the work is cut, an element is one sum in one order."""
    given = operands((96, 3, 32), (1500,), torch.float32, "b")
    whole = gk.gauge_linear(*given)
    for step in (1, 7, 600):
        parts = [gk.gauge_linear(part, *given[1:]) for part in given[0].split(step)]
        assert torch.equal(torch.cat(parts), whole)


def test_threads_change_no_bit():
    given = operands((96, 3, 32), (700,), torch.float32, "b")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gk.gauge_linear(*given))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_inputs_pass_through_untouched():
    """With F = 0 the outputs are the inputs themselves, bit for bit."""
    x, free, rows, *_ = operands((40, 2, 20), (9,), torch.float32, "")
    out = gk.gauge_linear(x, torch.zeros_like(free), rows)
    assert torch.equal(out, x[:, rows.flatten().long()])


def test_layouts():
    _, free, rows, *_ = operands((12, 3, 4))
    weight = dense(free, rows)
    assert torch.equal(free_of(weight, rows), free)
    index = free_rows(rows, 12)
    for head in range(3):
        assert sorted(index[head].tolist() + rows[head].tolist()) == list(range(12))
        assert torch.equal(weight[rows[head].long(), 4 * head : 4 * head + 4], torch.eye(4).double())


@pytest.mark.parametrize("options", ["", "b", "bwc", "w"])
def test_gradcheck(options):
    given = operands((6, 2, 3), (2, 3), options=options, grad=True)
    leaves = [x for x in given if x is not None]
    places = [name for name, x in zip(NAMES, given, strict=True) if x is not None]
    assert torch.autograd.gradcheck(
        lambda *x: gk.gauge_linear(**dict(zip(places, x, strict=True))), leaves, fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_as_accurate_as_those_of_the_dense_product(dtype):
    given = operands((48, 3, 16), (4, 9), dtype, "bwc", grad=True)
    leaves = [x for x in given if x is not None and x.is_floating_point()]
    seed = torch.randn(4, 9, 55).to(dtype)
    double = [None if x is None else x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
              for x in given]  # fmt: skip
    exact = torch.autograd.grad(
        reference(*double), [x for x in double if x is not None and x.is_floating_point()], seed.double()
    )
    naive = torch.autograd.grad(plain(*given), leaves, seed)
    found = torch.autograd.grad(gk.gauge_linear(*given), leaves, seed)
    for mine, right, plains in zip(found, exact, naive, strict=True):
        assert_accurate(mine, right, plains)


def test_what_is_frozen_gets_no_gradient():
    x, free, rows, bias, weight, weight_bias = operands(grad=True)
    for leaf in (x, free, bias, weight, weight_bias):
        given = [
            y if y is None or y is leaf else y.detach() for y in (x, free, rows, bias, weight, weight_bias)
        ]
        (gradient,) = torch.autograd.grad(gk.gauge_linear(*given).square().sum(), leaf)
        assert gradient.shape == leaf.shape and gradient.count_nonzero() == gradient.numel()


@pytest.mark.parametrize("options", ["", "bwc"])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_opcheck(batch, options):
    op = torch.ops.gaugekit.gauge_linear.default
    for dtype in (torch.float32, torch.bfloat16):
        given = operands(batch=batch, dtype=dtype, options=options, grad=dtype == torch.float32)
        torch.library.opcheck(op, given)
        out = op(*given)
        assert out.shape == (*batch, 12 + 7 * ("w" in options))
        if dtype == torch.float32 and out.numel():
            assert_accurate(out, reference(*wide(given)), plain(*given))
    x, free, rows, *_ = operands(batch=batch, dtype=torch.float32)
    grad = torch.randn(*batch, 12)
    torch.library.opcheck(
        torch.ops.gaugekit.gauge_linear_backward.default, (grad, x, free, rows, True, False)
    )


def test_strides():
    """Operands that are views of wider ones give the bits of dense ones."""
    given = operands(batch=(3, 5), dtype=torch.float32)
    strided = [
        None if x is None else torch.stack([x.detach(), torch.zeros_like(x)], -1)[..., 0] for x in given
    ]
    assert not any(x.is_contiguous() for x in strided if x.dim() > 1)
    turned = [given[0].transpose(0, 1).contiguous().transpose(0, 1), *given[1:]]
    rows_apart = [torch.cat([given[0], given[0]], -1)[..., :12], *given[1:]]
    expected = gk.gauge_linear(*given)
    for views in (turned, rows_apart):
        assert torch.equal(gk.gauge_linear(*views), expected)
    # a weight that is not dense goes to torch's product another way, and may be summed in another order
    assert torch.equal(gk.gauge_linear(*strided)[..., 7:], expected[..., 7:])
    torch.library.opcheck(torch.ops.gaugekit.gauge_linear.default, tuple(strided))


@pytest.mark.parametrize("public", [True, False])
def test_compile(public):
    counter = CompileCounterWithBackend("aot_eager")
    given = operands(dtype=torch.float32, grad=True)
    run = gk.gauge_linear if public else torch.ops.gaugekit.gauge_linear.default
    compiled = torch.compile(lambda *x: run(*x), fullgraph=True, backend=counter)
    out = compiled(*given)
    assert counter.frame_count == 1
    assert any(str(node.target).startswith("gaugekit.gauge_linear") for node in counter.graphs[0].graph.nodes)
    torch.testing.assert_close(out, run(*given))
    out.sum().backward()
    assert given[1].grad.abs().sum() > 0


def of_floats(function, given):
    """``function`` of those operands that are there and not integers, in their order; and these."""
    places = [i for i, x in enumerate(given) if x is not None and x.is_floating_point()]

    def call(*floats):
        return function(*(floats[places.index(i)] if i in places else x for i, x in enumerate(given)))

    return call, tuple(given[i] for i in places)


@pytest.mark.parametrize("options", ["", "bwc"])
def test_derivatives_by_forward_mode(options):
    given = operands(batch=(2, 5), options=options)
    (ours, floats), (torchs, _) = (of_floats(run, given) for run in (gk.gauge_linear, plain))
    tangents = tuple(map(torch.randn_like, floats))
    expected = torch.func.jvp(torchs, floats, tangents)
    assert expected[1].abs().min() > 0
    compiled = torch.compile(
        lambda *x: torch.func.jvp(ours, *x), fullgraph=True, backend=CompileCounterWithBackend("aot_eager")
    )
    torch.testing.assert_close(torch.func.jvp(ours, floats, tangents), expected)
    torch.testing.assert_close(compiled(floats, tangents), expected)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip(floats, tangents, strict=True)]
        torch.testing.assert_close(tuple(torch.autograd.forward_ad.unpack_dual(ours(*duals))), expected)


def test_transformations_of_functions():
    """vmap over every operand, the rows too; func.grad, and one inside the other; what autocast asks is not heard."""
    given = operands(batch=(5,))
    many = tuple(torch.stack([x, -x.flip(-1) if x.is_floating_point() else x.flip(0)]) for x in given)
    expected = torch.stack([plain(*(x[i] for x in many)) for i in range(2)])
    torch.testing.assert_close(torch.func.vmap(gk.gauge_linear)(*many), expected)
    alone = torch.func.vmap(gk.gauge_linear, in_dims=(1, None, None), out_dims=1)
    rows_alone = [plain(x, *given[1:3], None, None, None) for x in many[0].unbind(1)]
    torch.testing.assert_close(alone(many[0], *given[1:3]), torch.stack(rows_alone, 1))
    (ours, floats), (torchs, _) = (of_floats(run, given) for run in (gk.gauge_linear, plain))
    places = tuple(range(len(floats)))
    losses = [lambda *x, run=run: run(*x).pow(3).sum() for run in (ours, torchs)]
    torch.testing.assert_close(*(torch.func.grad(loss, places)(*floats) for loss in losses))
    rows = [
        torch.func.vmap(torch.func.grad(loss, 1), (0, None, None, None, None))(*floats) for loss in losses
    ]
    torch.testing.assert_close(*rows)
    torch.testing.assert_close(*(torch.func.hessian(loss, 1)(*floats) for loss in losses))
    narrow = [None if x is None else x.float() if x.is_floating_point() else x for x in given]
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.func.vmap(gk.gauge_linear, (0, None, None, None))(*narrow[:4])
    assert_accurate(found, reference(*wide(narrow[:4])), plain(*narrow[:4], None, None))


def public(*given):
    return gk.gauge_linear(*given)


def learning(x, *rest):
    return gk.gauge_linear(x.clone().requires_grad_(), *rest)


def mapped(x, *rest):
    return torch.func.vmap(lambda row: gk.gauge_linear(row, *rest))(x)


def mapped_rows(x, free, rows):
    return torch.func.vmap(gk.gauge_linear, (None, None, 0))(x, free, torch.stack([rows, rows]))


def tangents(x, *rest):
    return torch.func.jvp(lambda x: gk.gauge_linear(x, *rest), (x,), (x,))


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("run", [public, learning, mapped, mapped_rows, tangents])
def test_rows_that_do_not_fit(run, binary, monkeypatch):
    """Whoever computes it refuses them, with the same words; where there is nothing to compute, too."""
    x, free, rows, *_ = operands(options="")
    if not binary:
        monkeypatch.setattr("gaugekit._library.implementation", lambda *_: False)
    for bad in (rows + 12, rows - 12, rows * 0):
        with pytest.raises(ValueError, match="^rows: expected different inputs for each head, 0 to 11$"):
            run(x, free, bad)
    with pytest.raises(ValueError, match="^rows: expected different inputs for each head, 0 to 11$"):
        gk.gauge_linear(x[:0], free, rows * 0)
    run(x, free, rows)


def test_rows_are_looked_at_once(monkeypatch):
    """By the C++ operator where there is one, at a fraction of what the same in Python costs."""
    calls = []
    monkeypatch.setattr(operator, "_check_values", lambda *_: calls.append(1))
    x, free, rows, *_ = operands(options="")
    gk.gauge_linear(x, free, rows)
    there = _library.implementation("gauge_linear")
    assert len(calls) == (0 if there else 1)
    mapped(x, free, rows)
    assert len(calls) == (1 if there else 2)


def test_bad_input():
    x, free, rows, bias, weight, weight_bias = operands()
    for changes, message in (
        ({"x": x.long()}, "x: expected .* float16, got .* torch.int64"),
        ({"x": 3.0}, "x: expected a torch.Tensor"),
        ({"x": x[..., :3]}, "rows: expected a width of at most D = 3, got 4"),
        ({"free": free[:, 1:]}, r"free: expected \[3, 8, 4\] of torch.float64, got \[3, 7, 4\]"),
        ({"free": free.float()}, "free: expected .* torch.float64, got .* torch.float32"),
        ({"rows": rows.long()}, "rows: expected .* torch.int32"),
        ({"rows": rows[0]}, r"rows: expected \[heads, width\]"),
        ({"rows": rows * 0}, "rows: expected different inputs"),
        ({"rows": rows + 12}, "rows: expected different inputs for each head, 0 to 11"),
        ({"rows": rows - 12}, "rows: expected different inputs"),
        ({"bias": bias[1:]}, r"bias: expected \[12\]"),
        ({"weight": weight[:, 1:]}, r"weight: expected \[7, 12\]"),
        ({"weight_bias": weight_bias[1:]}, r"weight_bias: expected \[7\]"),
        ({"weight": None}, r"weight_bias: expected \[0\]"),
        ({"free": free.to("meta")}, "free: expected it on cpu"),
    ):
        given = dict(zip(NAMES, (x, free, rows, bias, weight, weight_bias), strict=True))
        with pytest.raises(ValueError, match=message):
            gk.gauge_linear(**given | changes)


def test_a_direct_call_reads_nothing_outside():
    """The operator itself refuses rows beside the inputs, as the public function does."""
    x, free, rows, *_ = operands(dtype=torch.float32)
    for bad in (rows + 12, rows - 12, rows * 0):
        with pytest.raises((RuntimeError, IndexError)):
            torch.ops.gaugekit.gauge_linear(x, free, bad, None, None, None)


@pytest.mark.parametrize("batch", [(5,), (2, 3), (1, 4), (), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_without_gradients(batch, bias):
    """It gives the bits of the one that has them."""
    x, free, rows, shift, *_ = operands(batch=batch, dtype=torch.float32, options="b" if bias else "")
    forward = torch.ops.gaugekit.gauge_linear_forward.default
    expected = torch.ops.gaugekit.gauge_linear(x, free, rows, shift, None, None)
    assert torch.equal(forward(x, free, rows, shift, None, None), expected)
    torch.library.opcheck(forward, (x, free, rows, shift, None, None))


@pytest.mark.parametrize("options", ["", "bwc"])
def test_autocast_changes_nothing_where_the_triton_kernels_do_not_fit(options):
    """Heads too wide for them: what is registered for GPUs computes as the C++ operator does, in the dtypes given."""
    given = operands((300, 2, 200), (5,), torch.float32, options)
    assert not cuda.fits(*given[:2])
    grad = torch.randn(5, 400)
    runs = (lambda: cuda.forward(*given), lambda: cuda.backward(grad, *given[:3], True, True))
    expected = [run() for run in runs]
    with torch.autocast("cpu", torch.bfloat16):
        found = [run() for run in runs]
    assert torch.equal(found[0], expected[0]) and all(map(torch.equal, found[1], expected[1]))
