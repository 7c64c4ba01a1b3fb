"""The operators over the kernels: what is registered for CUDA, called directly, and on a GPU the public functions."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import gaugekit as gk
from gaugekit.ops.shaped_attention import fused
from gaugekit.ops.shaped_combine import cuda as sweeps
from gaugekit.ops.shaped_combine import operator as combine
from helpers import assert_accurate
from triton_cases import DEVICE, DTYPES, GAINS, Case

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
gpu = pytest.mark.gpu
ORDER = ("alpha", "beta", "gamma", "v0", "lam")
STARTS = {"causal": True, "query_start": torch.tensor([-2, 3]), "key_lengths": torch.tensor([20, 11])}
CASES = {
    "every term, GQA": {"heads": 4, "batch": 2, "queries": 20, "keys": 20, "mask": STARTS},
    "beta alone": {"gains": "b", "queries": 20, "keys": 20, "mask": {"causal": True}},
}


def same_layout(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


def close(found, expected, dtype):
    for x, y in zip(found, expected, strict=True):
        x, y = (z.cpu().nan_to_num(neginf=0).to(dtype) for z in (x, y))
        assert_accurate(x, y.double(), y, ulps=32)


@pytest.mark.parametrize("name", CASES)
def test_combine_returns_what_the_composition_returns(name):
    case = Case(torch.float32, **CASES[name])
    a, v, *terms = (case.here(key) for key in ("a", "v", *ORDER))
    mask, grad = case.mask_here(), case.grad.to(DEVICE)
    pairs = [
        ([sweeps.forward(a, v, *terms, *mask)], [combine.composition(a, v, *terms, *mask)]),
        (sweeps.backward(grad, a, v, *terms, *mask), combine.composition_backward(grad, a, v, *terms, *mask)),
    ]
    for found, expected in pairs:
        same_layout(found, expected)
        close(found, expected, torch.float32)
    written = a.clone()
    sweeps.in_place(written, v, *terms, *mask)
    assert torch.equal(written, pairs[0][0][0])


@pytest.mark.parametrize("name", CASES)
def test_attention_returns_what_the_composition_returns(name):
    case = Case(torch.float32, key_width=16, **CASES[name])
    q, k, v, *terms = (case.here(key) for key in ("q", "k", "v", *ORDER))
    rest, grad = (*case.mask_here(), 0.25), case.grad.to(DEVICE)
    found, expected = fused._triton(q, k, v, *terms, *rest), fused.composition(q, k, v, *terms, *rest)
    same_layout(found, expected)
    close(found, expected, torch.float32)
    operands = (grad, q, k, v, *expected[1:], *terms, *rest)
    found, expected = fused._triton_backward(*operands), fused.composition_backward(*operands)
    same_layout(found, expected)
    close(found, expected, torch.float32)


def test_float64_and_wide_rows_go_to_the_composition():
    for options in ({"dtype": torch.float64}, {"dtype": torch.float32, "width": 300}):
        case = Case(**options, gains="b", queries=5, keys=5)
        a, v, *terms = (case.here(key) for key in ("a", "v", *ORDER))
        assert torch.equal(
            sweeps.forward(a, v, *terms, *case.mask_here()),
            combine.composition(a, v, *terms, *case.mask_here()),
        )


SHAPES = {
    "fused, narrow": {"key_width": 32, "width": 64, "queries": 300, "keys": 300, "mask": {"causal": True}},
    "fused, window": {"key_width": 64, "width": 128, "queries": 1500, "keys": 1500,
                      "mask": {"causal": True, "window": 200}},
    "fused, ragged, GQA": {"batch": 2, "heads": 4, "key_width": 80, "width": 96, "queries": 150, "keys": 200, "mask": {
        "causal": True, "query_start": torch.tensor([-3, 90]), "key_lengths": torch.tensor([200, 170])}},
    "fused, packed": {"key_width": 64, "width": 64, "queries": 500, "keys": 500, "mask": {
        "causal": True, "cu_seqlens": torch.tensor([0, 0, 130, 500], dtype=torch.int32)}},
    "core, causal": {"key_width": 128, "width": 128, "queries": 1100, "keys": 1100, "mask": {"causal": True}},
    "core, every key": {"key_width": 128, "width": 128, "queries": 1100, "keys": 1100},
    "core, one query": {"key_width": 64, "width": 64, "queries": 1, "keys": 700, "mask": {"causal": True}},
}  # fmt: skip


def public(case: Case, requires_grad: bool = True):
    given = {name: case.here(name) for name, x in case.operands.items() if x is not None}
    leaves = {name: x.requires_grad_(requires_grad) for name, x in given.items()}
    return leaves, dict(zip(case.mask, case.mask_here(), strict=True))


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_public_function_matches_float64(name, dtype):
    case = Case(dtype, **SHAPES[name])
    exact, naive = case.reference(torch.float64), case.reference(dtype)
    leaves, mask = public(case)
    core = gk.ops.shaped_attention.plan(**leaves, **mask).core
    assert dtype == torch.float32 or (core == "fused") == name.startswith("fused")
    out = gk.shaped_attention(**leaves, **mask)
    assert_accurate(out.detach().cpu(), exact["out"], naive["out"])
    gradients = torch.autograd.grad(out, list(leaves.values()), case.grad.to(DEVICE))
    found = {f"d{key}": x.cpu() for key, x in zip(leaves, gradients, strict=True)}
    for gain in (gain for gain in GAINS if f"d{gain}" in found):
        case.assert_gain_accurate(gain, found[f"d{gain}"], exact[f"d{gain}"], naive[f"d{gain}"])
    rows = [key for key in found if key[1:] not in GAINS]
    assert_accurate(*(torch.cat([kind[key].flatten() for key in rows]) for kind in (found, exact, naive)))


@gpu
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_the_same_bits_a_hundred_times(name):
    case = Case(torch.bfloat16, **SHAPES[name])
    leaves, mask = public(case)

    def gradients():
        out = gk.shaped_attention(**leaves, **mask)
        return torch.autograd.grad(out, list(leaves.values()), case.grad.to(DEVICE))

    first = gradients()
    for _ in range(100):
        assert all(torch.equal(x, y) for x, y in zip(gradients(), first, strict=True))


@gpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", SHAPES)
def test_compiles_as_one_graph_with_the_same_plan(name, backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(gk.shaped_attention, backend=counter, fullgraph=True)
    leaves, mask = public(Case(torch.bfloat16, **SHAPES[name]), requires_grad=False)
    out = compiled(**leaves, **mask)
    assert counter.frame_count == 1
    assert torch.equal(out, gk.shaped_attention(**leaves, **mask))


@gpu
@pytest.mark.parametrize("name", CASES)
def test_opcheck_on_the_gpu(name):
    case = Case(torch.float32, key_width=16, **CASES[name])
    q, k, v, *terms = (case.here(key) for key in ("q", "k", "v", *ORDER))
    mask = case.mask_here()
    torch.library.opcheck(torch.ops.gaugekit.shaped_attention.default, (q, k, v, *terms, *mask, 0.25))
    a = case.grad.to(DEVICE)
    torch.library.opcheck(torch.ops.gaugekit.shaped_combine.default, (a, v, *terms, *mask))
