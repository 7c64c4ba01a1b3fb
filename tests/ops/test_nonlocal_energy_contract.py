"""nonlocal_energy as a function: gradients by differences, opcheck, compile, autocast, bad input, empty input."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import gaugekit as gk
from helpers import assert_accurate

LENGTHS = torch.tensor([3, 0])


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


def make(dtype=torch.float32, batch=2, tokens=6, groups=2, gradient=False):
    shapes = ((batch, groups, tokens, 3), (batch, 4, tokens, 5), (batch, 2, tokens, 5))
    return [torch.randn(shape, dtype=dtype, requires_grad=gradient) for shape in shapes]


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"key_lengths": LENGTHS}], ids=str)
@pytest.mark.parametrize("kernel", ["softmax", "symmetric"])
def test_gradcheck(kernel, options):
    operands = make(torch.float64, batch=2, tokens=3, gradient=True)
    target, lam = torch.randn_like(operands[0]), torch.rand(4, dtype=torch.float64)
    leaves = (*operands, target.requires_grad_(), lam.requires_grad_())

    def function(u, q, k, f, gain):
        return gk.nonlocal_energy(u, q, k, target=f, lam=gain, kernel=kernel, **options)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(
    ("groups", "lengths", "row", "causal"),
    [(2, None, False, False), (4, None, True, True), (4, LENGTHS, False, False), (2, LENGTHS, False, True)],
)
def test_opcheck_of_the_operator(groups, lengths, row, causal):
    u, q, k = make(gradient=True, groups=groups)
    q = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    torch.library.opcheck(torch.ops.gaugekit.nonlocal_energy.default, (u, q, k, causal, lengths, 0.3, row))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck_of_other_dtypes_and_no_tokens(dtype):
    for tokens in (3, 0):
        operands = make(dtype, tokens=tokens, gradient=True)
        torch.library.opcheck(torch.ops.gaugekit.nonlocal_energy.default, (*operands, True, None, 0.3, False))


@pytest.mark.parametrize("kernel", ["softmax", "symmetric"])
@pytest.mark.parametrize("options", [{"causal": True}, {"key_lengths": LENGTHS, "gradient": "row"}], ids=str)
def test_fullgraph_compile(kernel, options):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gk.nonlocal_energy, backend=counter, fullgraph=True)
    operands = make(gradient=True)
    options = {"kernel": kernel, "target": torch.randn_like(operands[0]), "lam": 0.5, **options}
    found, eager = (f(*operands, **options) for f in (compiled, gk.nonlocal_energy))
    assert counter.frame_count == 1
    pairs = [
        (found, eager),
        *zip(*(torch.autograd.grad(x.sum(), operands) for x in (found, eager)), strict=True),
    ]
    for x, y in pairs:
        assert_accurate(x.detach(), y.detach().double(), y.detach())


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_inductor():
    quick = {"cpp.simdlen": 1, "cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}
    compiled = torch.compile(gk.nonlocal_energy, fullgraph=True, options=quick)
    operands = make()
    eager = gk.nonlocal_energy(*operands, causal=True)
    assert_accurate(compiled(*operands, causal=True), eager.double(), eager)


def test_autocast_does_not_round_the_energy():
    """Under autocast torch's attention would run in bfloat16, and the differences with it."""
    operands = make(gradient=True)
    plain = gk.nonlocal_energy(*operands)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gk.nonlocal_energy(*operands)
    assert cast.dtype == torch.float32 and torch.equal(cast, plain)


def test_empty():
    for batch, tokens in ((0, 3), (2, 0)):
        for kernel in ("softmax", "symmetric"):
            operands = make(batch=batch, tokens=tokens, gradient=True)
            energy = gk.nonlocal_energy(*operands, kernel=kernel)
            assert energy.shape == (batch, 4) and not energy.any()
            energy.sum().backward()


U, Q, K = make()
WRONG = [
    (dict(q=Q[0]), r"q: expected \[B, H, T, K\], got"),
    (dict(k=K[:, :, 1:]), r"k: expected \[B, G, T, K\]"),
    (dict(k=Q[:, :3]), r"k: expected \[B, G, T, K\], G dividing H"),
    (dict(u=torch.randn(2, 3, 6, 3)), r"u: expected \[B, G or H, T, V\]"),
    (dict(u=U.int()), "u: expected float32, float64, bfloat16 or float16"),
    (dict(q=Q.double()), "q: expected torch.float32 on cpu as u, got torch.float64"),
    (dict(lam=0.5), "target: expected beside lam"),
    (dict(target=U[:, :1], lam=0.5), "target: expected the shape of u"),
    (dict(target=U, lam=torch.ones(3)), r"lam: expected a number or \[\] or \[H\] = \[4\]"),
    (dict(kernel="gauss"), "kernel: expected one of softmax, symmetric; got 'gauss'"),
    (dict(gradient="none"), "gradient: expected one of full, row; got 'none'"),
    (dict(key_lengths=torch.tensor([3, 9])), "key_lengths: expected values in 0..S = 6"),
    (dict(key_lengths=torch.tensor([3])), "key_lengths: expected int64 of shape"),
]


@pytest.mark.parametrize(
    ("changes", "message"), WRONG, ids=lambda x: next(iter(x)) if isinstance(x, dict) else ""
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        gk.nonlocal_energy(**({"u": U, "q": Q, "k": K} | changes))
