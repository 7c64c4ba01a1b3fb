"""shaped_attention as a function: plan, compile, gradients by differences, opcheck, autocast, bad input."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import gaugekit as gk
from gaugekit.ops.shaped_attention import operator as op
from gaugekit.reference.shaped_attention import shaped_attention as reference
from helpers import assert_accurate


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


LENGTHS, START = torch.tensor([4, 9]), torch.tensor([-2, 1])


def make(
    dtype=torch.float32, batch=2, queries=9, keys=9, score_width=8, width=8, shaped=True, gradient=False
):
    shapes = {
        "q": (batch, 4, queries, score_width),
        "k": (batch, 2, keys, score_width),
        "v": (batch, 2, keys, width),
    }
    if shaped:
        shapes |= {"alpha": (4,), "beta": (4,), "gamma": (4,), "v0": (batch, 2, queries, width), "lam": (4,)}
    return {name: torch.randn(shape, dtype=dtype, requires_grad=gradient) for name, shape in shapes.items()}


PLANS = [
    ({}, {}, "none", 9),
    ({}, {"causal": True}, "is_causal", 9),
    ({}, {"causal": True, "key_lengths": LENGTHS}, "is_causal", 9),
    ({}, {"causal": True, "window": 9}, "is_causal", 9),
    ({}, {"key_lengths": LENGTHS}, "keys", 9),
    ({}, {"query_start": START}, "none", 9),
    ({}, {"causal": True, "query_start": START}, "blocks", 1024),
    ({}, {"window": 3}, "blocks", 128),
    ({"queries": 1}, {"causal": True}, "none", 1),
    ({"queries": 4}, {"causal": True}, "blocks", 1024),
    ({"batch": 1}, {"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "sequences", 9),
]


@pytest.mark.parametrize("sizes, options, mask, block", PLANS)
def test_plan(sizes, options, mask, block):
    operands = make(**sizes, shaped=False)
    found = op.plan(**operands, **options)
    assert found == op.Plan("torch scaled_dot_product_attention", mask, block, 8, False)
    meta = {name: x.to("meta") for name, x in operands.items()}
    tensors = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    assert op.plan(**meta, **tensors)[:3] == found[:3]  # reads no values


def test_plan_pads_to_the_wider_and_sees_the_gains():
    operands = make(score_width=4, width=8)
    assert op.plan(**operands, causal=True)[3:5] == (8, True)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"key_lengths": LENGTHS},
        {"causal": True, "key_lengths": LENGTHS},
        {"causal": True, "query_start": START, "window": 4},
        {"window": 3},
    ],
)
@pytest.mark.parametrize("gradient", [True, False])
def test_fullgraph_compile(options, gradient):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gk.shaped_attention, backend=counter, fullgraph=True)
    operands = make(gradient=gradient)
    out, eager = compiled(**operands, **options), gk.shaped_attention(**operands, **options)
    assert counter.frame_count == 1
    assert torch.equal(out, eager)
    if gradient:
        weight = torch.randn_like(out)
        found, expected = (torch.autograd.grad(x, operands.values(), weight) for x in (out, eager))
        for x, y in zip(found, expected, strict=True):
            assert_accurate(x, y.double(), y)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 3}])
def test_packed_sequences_compile_whole(options):
    """Their bounds stay unknown to the graph: other bounds, the same frame."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gk.shaped_attention, backend=counter, fullgraph=True)
    operands = make(batch=1, gradient=True)
    for bounds in ([0, 4, 9], [0, 7, 9]):
        options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
        out, eager = compiled(**operands, **options), gk.shaped_attention(**operands, **options)
        assert_accurate(out, eager.double(), eager)
        weight = torch.randn_like(out)
        found, expected = (torch.autograd.grad(x, operands.values(), weight) for x in (out, eager))
        for x, y in zip(found, expected, strict=True):
            assert_accurate(x, y.double(), y)
    assert counter.frame_count == 1


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_inductor():
    """Scalar code and no precompiled header: what is tested is that our operators lower, not the compiler's speed."""
    # A width that no processor has: torch keeps the instruction sets it once found, whatever is asked for later.
    quick = {"cpp.simdlen": 1, "cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}
    compiled = torch.compile(gk.shaped_attention, fullgraph=True, options=quick)
    operands = make(gradient=True)
    out = compiled(**operands, causal=True)
    eager = gk.shaped_attention(**operands, causal=True)
    assert_accurate(out, eager.double(), eager)
    weight = torch.randn_like(out)
    found, expected = (torch.autograd.grad(x, operands.values(), weight) for x in (out, eager))
    for x, y in zip(found, expected, strict=True):
        assert_accurate(x, y.double(), y)


@pytest.mark.parametrize("options", [{"causal": True}, {"window": 2}, {"key_lengths": torch.tensor([2, 0])}])
def test_gradcheck(options):
    operands = make(torch.float64, queries=4, keys=4, score_width=3, width=2, gradient=True)
    names = list(operands)

    def function(*tensors):
        return gk.shaped_attention(**dict(zip(names, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(function, list(operands.values()))


def test_opcheck_of_the_operator_it_ends_in():
    """With the core's own output: the transposed layout that torch's attention returns for [B, T, H·K] projections."""
    q, k, v = (torch.randn(2, 9, 4, 8).transpose(1, 2) for _ in range(3))
    a = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert not a.is_contiguous()
    call = (a, v, torch.ones(4), None, torch.ones(4), None, None, True, None, None, LENGTHS, None)
    torch.library.opcheck(torch.ops.gaugekit.shaped_combine.default, call)
    out = gk.shaped_attention(q, k, v, alpha=torch.ones(4), gamma=torch.ones(4), causal=True)
    assert out.transpose(1, 2).is_contiguous()


def test_views_of_the_input_are_values():
    """V as a strided view of x [B, T, H·V]: same numbers, and the gradient goes to x."""
    x = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    view = x.view(2, 9, 4, 8).transpose(1, 2)
    q, k = (torch.randn(2, 4, 9, 8, dtype=torch.float64) for _ in range(2))
    gains = {name: torch.randn(4, dtype=torch.float64) for name in ("alpha", "beta", "gamma")}
    out = gk.shaped_attention(q, k, view, **gains, causal=True)
    ref = reference(q, k, view.contiguous(), **gains, causal=True)
    assert_accurate(out, ref, ref)
    weight = torch.randn_like(out)
    found, expected = (torch.autograd.grad(y, x, weight)[0] for y in (out, ref))
    assert_accurate(found, expected, expected)


def test_inputs_are_never_written():
    for options in ({"causal": True}, {"key_lengths": LENGTHS}, {}):
        operands = make()
        before = {name: x.clone() for name, x in operands.items()}
        gk.shaped_attention(**operands, **options)
        assert all(torch.equal(x, before[name]) for name, x in operands.items())


def test_autocast():
    operands = make(gradient=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gk.shaped_attention(**operands, causal=True)
    low = {name: x.bfloat16() if x.dim() == 4 else x for name, x in operands.items()}
    assert out.dtype == torch.bfloat16 and torch.equal(out, gk.shaped_attention(**low, causal=True))
    out.float().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in operands.values())


BAD = {
    "k": {"k": torch.ones(2, 2, 9, 7)},
    "k:": {"k": torch.ones(2, 2, 9, 8, dtype=torch.bfloat16)},
    "k::": {"k": torch.ones(2, 2, 8, 8)},
    "v": {"v": torch.ones(2, 2, 9, 8, dtype=torch.float64)},
    "v:": {"v": torch.ones(2, 3, 9, 8), "k": torch.ones(2, 3, 9, 8)},
    "v::": {"q": torch.ones(4, 9, 8)},
    "window": {"window": -1},
    "window:": {"window": 2.0},
    "window::": {"window": 0},
    "lam": {"lam": None},
    "lam:": {"lam": torch.ones(3)},
    "v0": {"v0": None},
    "v0:": {"v0": torch.ones(2, 2, 9, 8, dtype=torch.bfloat16)},
    "alpha": {"alpha": torch.ones(5)},
    "beta": {"beta": torch.ones(4, 1)},
    "gamma": {"gamma": torch.ones(2)},
    "key_lengths": {"key_lengths": torch.tensor([-1, 9])},
    "query_start": {"query_start": torch.zeros(3, dtype=torch.int64)},
    "cu_seqlens": {"batch": 1, "cu_seqlens": torch.tensor([0, 9])},
    "cu_seqlens:": {
        "batch": 1,
        "cu_seqlens": torch.tensor([0, 9], dtype=torch.int32),
        "key_lengths": LENGTHS[:1],
    },
    "dtype": {name: torch.ones(2, 2, 9, 8, dtype=torch.int32) for name in "qkv"},
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("compiled", [False, True])
def test_bad_input_names_the_argument(name, compiled):
    function = torch.compile(gk.shaped_attention, backend="aot_eager") if compiled else gk.shaped_attention
    options = dict(BAD[name])
    if compiled and name == "key_lengths":
        pytest.skip("values are not read while compiling; they are clamped")
    with pytest.raises(ValueError, match=f"^{name.rstrip(':')}: expected .* got "):
        function(**{**make(batch=options.pop("batch", 2)), **options})


def test_alpha_without_causal_needs_as_many_queries_as_keys():
    with pytest.raises(ValueError, match="^alpha, lam: expected T = S without causal, got T = 4, S = 9"):
        gk.shaped_attention(**make(queries=4))
