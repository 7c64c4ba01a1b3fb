"""Compact projections: by our kernel and by torch, the same numbers; in training the same step as the dense layer's."""

import copy
import io
import pickle
from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from gaugekit.nn import Concat, GaugeProjection
from gaugekit.nn.shortcuts import TriangularShortcut
from gaugekit.ops import processor
from gaugekit.ops.gauge_linear import choice
from gaugekit.ops.gauge_linear.layout import free_rows
from helpers import assert_accurate
from projections import randomised, trained_beside_dense

SIZES = (48, 3, 16)


def projection(dtype=torch.float32, bias=False, padded=None):
    inputs, heads, width = SIZES
    return randomised(GaugeProjection(inputs, heads, width, bias, padded, dtype=dtype), 0.2)


@pytest.fixture(params=["kernel", "kernel in training too", "dense"])
def way(request, monkeypatch):
    """Every projection takes the kernel, or none does, whatever was measured on this machine."""
    monkeypatch.setattr(choice, "plan", lambda *_: (request.param.split()[0], "the test says so"))
    monkeypatch.setattr(choice, "trains", lambda *_: "training" in request.param)
    return request.param


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(way, dtype, bias):
    module = projection(dtype, bias)
    leaves = list(module.parameters())
    x, seed = torch.randn(2, 7, 48).to(dtype).requires_grad_(), torch.randn(2, 7, 48).to(dtype)
    wide = copy.deepcopy(module).double()
    wide_x = x.detach().double().requires_grad_()
    exact = linear(wide_x, wide.weight, wide.bias)
    naive = linear(x, module.weight, module.bias)
    out = module(x)
    with torch.no_grad():
        assert_accurate(module(x), exact.detach(), naive.detach())
    found = torch.autograd.grad(out, [x, *leaves], seed)
    expected = torch.autograd.grad(exact, [wide_x, *wide.parameters()], seed.double())
    naives = torch.autograd.grad(naive, [x, *leaves], seed)
    for mine, right, plain in zip(found, expected, naives, strict=True):
        assert_accurate(mine, right, plain)


def test_padding_and_no_rows(way):
    module = projection(padded=20)
    x = torch.randn(4, 48)
    y = module(x).unflatten(-1, (3, 20))
    assert not y[..., 16:].any() and y[..., :16].abs().min() > 0
    assert module(x[:0]).shape == (0, 60)


def test_compiled(way):
    module = projection()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    x = torch.randn(6, 48)
    torch.testing.assert_close(compiled(x), module(x))
    assert counter.frame_count == 1
    gradients = [torch.autograd.grad(run(x).square().sum(), module.free)[0] for run in (compiled, module)]
    torch.testing.assert_close(*gradients)
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend=counter)(x), module(x))


def test_a_trace_with_gradients_is_saved_and_loaded(way):
    module, x, file = projection(), torch.randn(6, 48), io.BytesIO()
    torch.jit.save(torch.jit.trace(module, (x,)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    torch.testing.assert_close(loaded(x), module(x))
    mine, plain = (torch.autograd.grad(f(x).square().sum(), f.free)[0] for f in (loaded, module))
    torch.testing.assert_close(mine, plain)


def test_autocast_is_that_of_a_linear(way):
    module, x = projection(), torch.randn(5, 48)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(module(x), linear(x, module.weight))
        assert module(x).dtype == torch.bfloat16


def test_a_step_of_training_is_that_of_the_dense_layer_projected_on_it(way):
    """Plain gradient descent on the dense weight, its identity block put back, is the step of the free part."""
    module = projection(torch.float64)
    heads = trained_beside_dense(module, lambda block: torch.eye(16, dtype=torch.float64), rate=0.1)
    index = free_rows(module.rows, 48)
    free = torch.stack([w[:, i].T for w, i in zip(heads, index, strict=True)])
    torch.testing.assert_close(module.free.detach(), free, rtol=1e-13, atol=1e-13)


def test_what_is_written_to_it_is_seen(way):
    """In evaluation mode too, where a dense weight is kept: writes, an optimizer, loading, another dtype and back."""
    module, x = projection().eval(), torch.randn(4, 48)
    other = projection()

    def check():
        with torch.no_grad():
            found = module(x)
            assert torch.equal(module(x), found)
        naive = linear(x, module.weight).detach()
        assert_accurate(found, linear(x.double(), module.weight.detach().double()), naive)
        return found

    seen = [check()]
    with torch.no_grad():
        module.free.mul_(2)
    seen.append(check())
    module.free.grad = torch.ones_like(module.free)
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    seen.append(check())
    module.load_state_dict(other.state_dict())
    seen.append(check())
    module.bfloat16().float()
    seen.append(check())
    module.rows.copy_(module.rows.flip(0))
    seen.append(check())
    module.free.data.neg_()
    module.eval()
    seen.append(check())
    module.free = torch.nn.Parameter(other.free.detach() * 3)
    seen.append(check())
    module.free.data = other.free.detach() * 5
    seen.append(check())
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))


def test_a_dense_weight_is_made_once_in_evaluation_mode(monkeypatch):
    monkeypatch.setattr(choice, "plan", lambda *_: ("dense", ""))
    calls = []
    monkeypatch.setattr("gaugekit.nn.gauge_projection.dense", lambda *x: calls.append(x) or dense(*x))
    from gaugekit.ops.gauge_linear.layout import dense

    module, x = projection().eval(), torch.randn(4, 48)
    with torch.no_grad():
        for _ in range(3):
            module(x)
    assert len(calls) == 1
    module(x)  # gradients flow
    module.train()
    with torch.no_grad():
        module(x)
        module(x)
    assert len(calls) == 4 and module._kept is None


def test_copies_and_files_hold_only_what_is_its_own(way):
    module, x = projection().eval(), torch.randn(4, 48)
    with torch.no_grad():
        expected = module(x)
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        loaded = GaugeProjection(*SIZES)
        loaded.load_state_dict(torch.load(file))
        assert set(module.state_dict()) == {"free", "rows"}
        for other in (*copies, loaded.eval()):
            assert other._kept is None and torch.equal(other(x), expected)
            other.free.zero_()
            assert not torch.equal(other(x), expected) and torch.equal(module(x), expected)


def test_transformations_of_functions_get_a_weight_of_their_own(way):
    module, x = projection().eval(), torch.randn(2, 4, 48)
    frees = torch.stack([module.free.detach(), -module.free.detach()])
    with torch.no_grad():
        module(x[0])
        for free, part in zip(frees, x, strict=True):
            found = torch.func.functional_call(module, {"free": free}, part)
            single = projection()
            single.load_state_dict({"free": free, "rows": module.rows})
            torch.testing.assert_close(found, single(part))
    with torch.inference_mode():
        inner = projection().eval()
        torch.testing.assert_close(inner(x[0]), linear(x[0], inner.weight))
        inner.free.mul_(2)
        torch.testing.assert_close(inner(x[0]), linear(x[0], inner.weight))


def test_the_plan_says_why():
    sizes = (384, 6, 64)
    for kind, size, dtype, device, product, why in (
        ("AVX2", sizes, torch.float32, "cpu", "kernel", "Zen 3"),
        ("AVX2", sizes, torch.float32, "cuda", "dense", "not been measured on cuda"),
        ("AVX2", sizes, torch.float64, "cpu", "dense", "float64 on AVX2"),
        ("AVX512", sizes, torch.float32, "cpu", "dense", "float32 on AVX512"),
        ("AVX512-BF16", sizes, torch.float32, "cpu", "kernel", "Zen 4"),
        ("AVX512-BF16", (96, 4, 24), torch.float32, "cpu", "dense", "heads of 24 numbers"),
        ("", sizes, torch.float32, "cpu", "dense", "binary is missing"),
        ("AVX2", (100, 5, 20), torch.float32, "cpu", "dense", "heads of 20 numbers"),
        ("AVX2", (768, 2, 64), torch.float32, "cpu", "kernel", "Zen 3"),
        ("AVX2", (768, 24, 32), torch.float32, "cpu", "dense", "narrower than 1/12"),
        ("AVX2", (1024, 8, 128), torch.float32, "cpu", "dense", "beyond 768 inputs"),
    ):
        found, reason = choice.plan(kind, *size, dtype, device)
        assert found == product and why in reason
    here = GaugeProjection(384, 6, 64)
    assert here.product == choice.plan(choice.kind(), 384, 6, 64, torch.float32, "cpu")


def test_processors_that_multiply_pairs_in_other_ways_too_were_not_measured(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(choice._library, "implementation", lambda name: True)
    for flags, kind in (
        (processor.PAIRS, "AVX512-BF16"),
        (processor.PAIRS | {"amx_tile"}, "AVX512"),
        (processor.PAIRS - {"avx512_vbmi2"}, "AVX512"),
    ):
        monkeypatch.setattr(processor, "flags", lambda flags=flags: frozenset(flags))
        assert choice.kind.__wrapped__() == kind


def test_a_bias_alone_may_learn(way):
    module = projection(bias=True)
    module.free.requires_grad_(False)
    module(torch.randn(3, 48)).sum().backward()
    assert torch.equal(module.bias.grad, torch.full((48,), 3.0))


def test_derivatives_by_forward_mode_and_vmap(way):
    module, x = projection().eval(), torch.randn(4, 48)
    with torch.no_grad():
        expected = module(x)
        rows = torch.func.vmap(module)(x)
        value, tangent = torch.func.jvp(module, (x,), (x,))
    for found in (rows, value, tangent):
        torch.testing.assert_close(found, expected)


class Marked(torch.nn.Linear):
    """A part that computes what it likes."""

    def forward(self, x):
        return super().forward(x) + 1


class Doubled(torch.Tensor):
    """A weight whose product is its own affair."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        y = super().__torch_function__(function, types, args, kwargs)
        return 2 * y if function is linear else y


class Operators(TorchDispatchMode):
    """The names of ours that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "gaugekit":
            self.names.append(function._schema.name.removeprefix("gaugekit::"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [False, True])
def test_the_kernel_is_taken_where_it_is_to_be(way, bias):
    module, x = projection(bias=bias), torch.randn(5, 48)

    def operators(x):
        with Operators() as seen:
            module(x)
        return seen.names

    expected = ["gauge_linear_forward"] if way != "dense" else []
    learning = expected if "training" in way else []
    for _ in range(2):
        assert operators(x) == learning  # gradients flow
        with torch.no_grad():
            assert operators(x) == operators(x[0]) == expected
            with torch.autocast("cpu", torch.bfloat16):
                assert operators(x) == []
            with Operators() as seen:
                torch.func.vmap(module)(x)
                torch.func.jvp(module, (x,), (x,))
            assert seen.names == []
        module.eval()
    module.requires_grad_(False)
    assert operators(x) == expected
    assert operators(x.clone().requires_grad_()) == learning


def test_compiled_without_gradients_the_kernel_is_in_the_graph(way):
    graphs = []
    torch._dynamo.reset()  # the compilers of all ways share one limit

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    module, x = projection().eval().requires_grad_(False), torch.randn(5, 48)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend=backend)(x), module(x))
    torch.compile(torch.func.vmap(module), fullgraph=True, backend=backend)(x)
    kernel = torch.ops.gaugekit.gauge_linear_forward.default
    taken = [any(node.target is kernel for node in graph.graph.nodes) for graph in graphs]
    assert taken == [way != "dense", False]


def shortcut():
    module = TriangularShortcut(48)
    torch.nn.init.normal_(module.packed)
    return module


@pytest.mark.parametrize("build", [projection, shortcut])
def test_what_is_kept_is_good_for_a_later_backward(build, monkeypatch):
    monkeypatch.setattr(choice, "plan", lambda *_: ("dense", ""))
    module = build().eval().requires_grad_(False)
    x, rest = torch.randn(4, 48), () if build is projection else (torch.randn(4, 48),)
    with torch.inference_mode():
        expected = module(*rest, x)
        assert torch.equal(module(*rest, x), expected)
    assert module._kept is not None
    leaf = x.clone().requires_grad_()
    y = module(*rest, leaf)
    assert torch.equal(y, expected)
    (gradient,) = torch.autograd.grad(y.sum(), leaf)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: module(*rest, x).sum())(x))


@pytest.mark.parametrize("build", [projection, shortcut])
@pytest.mark.parametrize("before", [False, True])
def test_a_trace_leaves_nothing_behind(build, before, monkeypatch):
    monkeypatch.setattr(choice, "plan", lambda *_: ("dense", ""))
    module = build().eval().requires_grad_(False)
    given = [torch.randn(4, 48) for _ in range(1 if build is projection else 2)]
    expected = copy.deepcopy(module)(*given)
    if before:
        module(*given)
    for mode in ("fake", "real"):
        graph = make_fx(module, tracing_mode=mode, _allow_non_fake_inputs=True)(*given)
        assert torch.equal(module(*given), expected)
        torch.testing.assert_close(graph(*given), expected)
    assert type(module._kept.tensor) is torch.Tensor


def test_concat_is_what_its_parts_give_side_by_side(way):
    """With gradients and without, under hooks, for one row and for none, for parts and weights of other classes."""
    parts = [torch.nn.Linear(48, 10), projection(), torch.nn.Linear(48, 5, bias=False), projection(bias=True)]
    doubled = torch.nn.Linear(48, 4)
    doubled.weight = torch.nn.Parameter(doubled.weight.detach().as_subclass(Doubled))
    parts += [Marked(48, 3), doubled]
    module, x = Concat(parts).eval(), torch.randn(2, 6, 48)
    assert module(x).requires_grad and torch.equal(module(x), torch.cat([part(x) for part in parts], -1))
    seen = []
    with torch.no_grad():
        expected = torch.cat([part(x) for part in parts], -1)
        once = linear(x, doubled.weight.as_subclass(torch.Tensor), doubled.bias)
        assert torch.equal(expected[..., -4:], 2 * once)
        assert torch.equal(module(x), expected)
        torch.testing.assert_close(module(x[0, 0]), expected[0, 0])
        assert module(x[:, :0]).shape == (2, 0, 118)
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
        torch.testing.assert_close(torch.func.vmap(Concat(parts[:5]))(x), expected[..., :-4])
        parts[1].register_forward_hook(lambda *_: seen.append(1))
        everywhere = torch.nn.modules.module.register_module_forward_hook(lambda part, *_: seen.append(part))
        try:
            assert torch.equal(module(x), expected)
        finally:
            everywhere.remove()
        assert [part for part in seen if part != 1] == [*parts, module] and seen.count(1) == 1


def test_concat_on_the_meta_device(way):
    module, x = Concat([torch.nn.Linear(48, 10), projection()]).eval(), torch.randn(2, 48)
    with torch.no_grad():
        y = module.to("meta")(x.to("meta"))
    assert y.is_meta and y.shape == (2, 58)
