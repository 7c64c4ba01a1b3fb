"""The Triton nonlocal energy against the equation, forward and backward; on a GPU also the public function."""

import itertools

import pytest
import torch

import gaugekit as gk
from gaugekit.ops.nonlocal_energy import rows
from gaugekit.ops.nonlocal_energy.operator import centred
from gaugekit.reference.nonlocal_energy import nonlocal_energy as reference
from helpers import assert_accurate
from triton_cases import DEVICE, DTYPES

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
gpu = pytest.mark.gpu
LENGTHS = torch.tensor([33, 0])
CASES = {  # heads of u and of k, tokens, K, V, causal, lengths, row
    "causal": (4, 4, 40, 16, 24, True, None, False),
    "grouped, ragged": (2, 2, 40, 24, 8, False, LENGTHS, False),
    "u of heads, k of one group, causal, ragged, row": (4, 1, 40, 16, 16, True, LENGTHS, True),
}


def make(name, dtype):
    of_u, of_k, tokens, key_width, width, causal, lengths, row = CASES[name]
    real = None if lengths is None else (torch.arange(tokens) < lengths[:, None])[:, None]
    u = centred(0.5 + torch.randn(2, of_u, tokens, width), real)
    q, k = torch.randn(2, 4, tokens, key_width), torch.randn(2, of_k, tokens, key_width)
    return [x.to(dtype) for x in (u, q, k)], {"causal": causal, "key_lengths": lengths}, 0.3, row


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in CASES
        for dtype in DTYPES
        if DEVICE == "cuda" or (dtype == DTYPES[0]) != ("row" in name)
    ],
)
def test_rows_and_gradients_match_float64(name, dtype):
    operands, mask, scale, row = make(name, dtype)
    there = [x.to(DEVICE) for x in operands]
    lengths = None if mask["key_lengths"] is None else mask["key_lengths"].to(DEVICE)
    rest = (mask["causal"], lengths, scale, row)
    energies, log, out = rows._triton(*there, *rest)
    weight = torch.randn(2, 4)
    grad = weight[..., None].expand_as(energies).to(DEVICE)
    zero = torch.zeros_like(energies)
    found = [energies.sum(-1), *rows._triton_backward(grad, zero, *there, energies, log, out, *rest)]
    given = {"scale": scale, "gradient": "row" if row else "full", **mask}
    exact, naive = (_reference(operands, kind, weight, given) for kind in (torch.float64, dtype))
    for x, y, z in zip(found, exact, naive, strict=True):
        x = x.cpu().to(z.dtype)
        assert_accurate(x, y, z)
    other = rows.composition(*operands, *(x.cpu() if isinstance(x, torch.Tensor) else x for x in rest))
    assert_accurate(
        log.cpu().nan_to_num(neginf=0), other[1].nan_to_num(neginf=0).double(), other[1].nan_to_num(neginf=0)
    )


def _reference(operands, dtype, weight, given):
    leaves = [x.to(dtype).requires_grad_() for x in operands]
    energy = reference(*leaves, **given)
    return [energy.detach(), *torch.autograd.grad((energy * weight.to(dtype)).sum(), leaves)]


def test_gradient_of_the_log_sum_exps():
    operands, _, scale, _ = make("causal", torch.float32)
    rest = (True, None, scale, False)
    forward = rows.composition(*operands, *rest)
    grad, grad_log = torch.randn_like(forward[0]), torch.randn_like(forward[0])
    there = [x.to(DEVICE) for x in (grad, grad_log, *operands, *forward)]
    found = [x.cpu() for x in rows._triton_backward(*there, *rest)]
    naive = rows.composition_backward(grad, grad_log, *operands, *forward, *rest)
    doubles = [x.double() for x in (grad, grad_log, *operands)]
    exact = rows.composition_backward(*doubles, *rows.composition(*doubles[2:], *rest), *rest)
    for x, y, z in zip(found, exact, naive, strict=True):
        assert_accurate(x, y, z, ulps=32)


def public(dtype, of_u=2, tokens=300, width=64):
    shapes = ((2, of_u, tokens, width), (2, 4, tokens, 64), (2, 2, tokens, 64))
    return [torch.randn(shape, dtype=torch.float32).to(dtype) for shape in shapes]


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kernel", "gradient"), list(itertools.product(("softmax", "symmetric"), ("full", "row")))
)
def test_public_function_matches_float64(kernel, gradient, dtype):
    operands, weight = public(dtype), torch.randn(2, 4)
    given = {"kernel": kernel, "gradient": gradient, "causal": True}
    exact, naive = (_reference(operands, kind, weight, given) for kind in (torch.float64, dtype))
    leaves = [x.to(DEVICE).requires_grad_() for x in operands]
    energy = gk.nonlocal_energy(*leaves, **given)
    found = [energy.detach(), *torch.autograd.grad((energy * weight.to(DEVICE)).sum(), leaves)]
    for x, y, z in zip(found, exact, naive, strict=True):
        assert_accurate(x.cpu().to(z.dtype), y, z)


@gpu
def test_gradients_are_the_same_bits_a_hundred_times():
    leaves = [x.to(DEVICE).requires_grad_() for x in public(torch.bfloat16)]

    def gradients():
        return torch.autograd.grad(gk.nonlocal_energy(*leaves, causal=True).sum(), leaves)

    first = gradients()
    for _ in range(100):
        assert all(torch.equal(x, y) for x, y in zip(gradients(), first, strict=True))


@gpu
@pytest.mark.parametrize("width", [64, 256])
def test_opcheck_and_wide_heads(width):
    operands = [x.to(DEVICE) for x in public(torch.float32, tokens=70, width=width)]
    torch.library.opcheck(torch.ops.gaugekit.nonlocal_energy.default, (*operands, True, None, 0.3, False))
    exact = reference(*(x.cpu().double() for x in operands), causal=True)
    naive = reference(*(x.cpu() for x in operands), causal=True)
    assert_accurate(gk.nonlocal_energy(*operands, causal=True).cpu(), exact, naive)
