"""shaped_combine and its gradients: C++ and the composition against the float64 reference."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaugekit import _library
from gaugekit.ops.mask import Mask
from gaugekit.ops.shaped_combine import operator as op
from gaugekit.reference.shaped_combine import shaped_combine as reference
from helpers import assert_accurate
from masks import draw_mask
from warm import python

GAINS = ("alpha", "beta", "gamma", "lam")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TERMS = ("alpha", "beta", "gamma", "v0", "lam")
IMPLEMENTATIONS = ["composition"] + (["binary"] if _library.implementation("shaped_combine") else [])


def make(dtype, batch=2, heads=4, groups=2, queries=37, keys=37, width=24, terms=TERMS, offset=0.0):
    """Operands with a gradient wanted; ``offset`` moves the values so that their mean does not vanish."""
    shapes = {"a": (batch, heads, queries, width), "v": (batch, groups, keys, width)}
    shapes |= {name: (heads,) if name in GAINS else (batch, groups, queries, width) for name in terms}
    return {
        name: (torch.randn(shape) + offset).to(torch.float32 if name in GAINS else dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def run(implementation, operands, mask, weight):
    """The output and the gradients of <output, weight> by the named implementation."""
    ordered = [operands.get(name) for name in ("a", "v", *TERMS)]
    if implementation == "binary":
        out = op.shaped_combine(**operands, **mask)
        gradients = torch.autograd.grad(out, operands.values(), weight)
        return out.detach(), dict(zip(operands, gradients, strict=True))
    with torch.no_grad():
        out = op.composition(*ordered, *Mask(**mask))
        found = op.composition_backward(weight, *ordered, *Mask(**mask))
    names = ("a", "v", *TERMS)
    return out, {name: g for name, g, x in zip(names, found, ordered, strict=True) if x is not None}


def by_reference(operands, mask, weight, dtype):
    cast = {name: x.detach().to(dtype).requires_grad_() for name, x in operands.items()}
    out = reference(**cast, **mask)
    gradients = torch.autograd.grad(out, cast.values(), weight.to(dtype), materialize_grads=True)
    return out.detach(), dict(zip(cast, gradients, strict=True))


def compare(implementation, operands, mask):
    dtype = operands["v"].dtype
    weight = torch.randn(operands["a"].shape).to(dtype)
    out, gradients = run(implementation, operands, mask, weight)
    ref, ref_gradients = by_reference(operands, mask, weight, torch.float64)
    naive, naive_gradients = by_reference(operands, mask, weight, dtype)
    assert out.dtype == dtype
    assert_accurate(out, ref, naive)
    for name, gradient in gradients.items():
        assert gradient.dtype == operands[name].dtype and gradient.shape == operands[name].shape
        assert_accurate(gradient, ref_gradients[name], naive_gradients[name].to(gradient.dtype))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_every_term_in_every_dtype(implementation, dtype, causal, window):
    compare(implementation, make(dtype), {"causal": causal, "window": window})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "terms",
    [(), ("alpha",), ("beta",), ("gamma",), ("v0", "lam"), ("alpha", "beta", "gamma")],
)
def test_absent_terms(implementation, terms):
    compare(implementation, make(torch.float32, terms=terms), {"causal": True})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [1, 3, 8, 16, 17, 64, 129])
def test_widths(implementation, width):
    compare(implementation, make(torch.float32, width=width, queries=11, keys=11), {"causal": True})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3, 700])
def test_long_sums_do_not_drift(implementation, dtype, causal, window):
    """Values with a mean of 1 over 3,000 rows: a float32 running sum would be wrong in its fourth digit."""
    operands = make(dtype, batch=1, heads=1, groups=1, queries=3000, keys=3000, width=4, offset=1.0)
    compare(implementation, operands, {"causal": causal, "window": window})


@st.composite
def problems(draw):
    causal = draw(st.booleans())
    batch, groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    keys = draw(st.integers(1, 40))
    queries = draw(st.integers(1, 40)) if causal else keys
    mask = draw_mask(draw, causal, batch, queries, keys)
    return make(torch.float64, batch, groups * per_group, groups, queries, keys, width=3), mask


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(problem=problems())
def test_every_mask(implementation, problem):
    compare(implementation, *problem)


@pytest.mark.skipif("binary" not in IMPLEMENTATIONS, reason="no C++ binary")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_agrees(capability, tmp_path):
    """The portable and the AVX2 code, forced in processes of their own, give what the widest gives, to rounding."""
    program = (
        "import sys, torch, test_shaped_combine as t\n"
        "torch.save([t.flat(x) for x in torch.load(sys.argv[1])], sys.argv[2])\n"
    )
    problems = [make(dtype, width=width) for dtype in DTYPES for width in (64, 70)]
    torch.save(problems, tmp_path / "problems")
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(paths)}
    command = [*python(), "-c", program, str(tmp_path / "problems"), str(tmp_path / "found")]
    subprocess.run(command, check=True, env=environment)
    for found, problem in zip(torch.load(tmp_path / "found"), problems, strict=True):
        for one, widest in zip(found, flat(problem), strict=True):
            assert_accurate(one, widest.double(), widest)


def flat(problem):
    """The output and every gradient of the binary, with a window in half of the problems."""
    mask = {"causal": True, "window": 9 if problem["v"].shape[3] == 70 else None}
    out, gradients = run("binary", problem, mask, problem["a"].detach())
    return [out, *gradients.values()]
